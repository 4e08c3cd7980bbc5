"""Packages as a user would install them, written into a folder on the Python path."""

from pathlib import Path


def write_plugin(folder: Path, module: str, code: str, group: str = "", name: str = "") -> None:
    """Write a module and, if a group is named, the metadata that makes it an installed plugin.

    Args:
        folder: a folder on the Python path.
        module: name of the module.
        code: its source; an entry point refers to the function `load`.
        group: group of the entry point, such as "robustsoup.data".
        name: name of the entry point.
    """
    (folder / f"{module}.py").write_text(code)
    if group:
        metadata = folder / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:load\n")
