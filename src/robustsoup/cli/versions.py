"""Versions of robustsoup and of what it uses, read without importing anything."""

import importlib.metadata
import platform
import re

EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")
DEVELOPMENT_EXTRAS = ("test", "docs", "dev", "browser", "fuzz", "notebooks")
"""Extras for work on robustsoup itself; the others add abilities."""


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def list_versions() -> dict[str, str | None]:
    """Return the version of Python and of every required package; None if it is missing."""
    packages = [name for name, extra in _list_requirements() if extra is None]
    return {"python": platform.python_version()} | {n: package_version(n) for n in packages}


def list_extras() -> dict[str, dict[str, str | None]]:
    """Return, for each extra that adds an ability, its packages and their versions."""
    extras: dict[str, dict[str, str | None]] = {}
    for package, extra in _list_requirements():
        if extra is not None and extra not in DEVELOPMENT_EXTRAS:
            extras.setdefault(extra, {})[package] = package_version(package)
    return extras


def _list_requirements() -> list[tuple[str, str | None]]:
    """Return (package, extra or None) for each requirement of robustsoup."""
    try:
        lines = importlib.metadata.requires("robustsoup") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = []
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = EXTRA.search(line)
        if name is not None:
            requirements.append((name.group(), extra.group(1) if extra else None))
    return requirements
