"""Try an installed wheel in an empty environment, for `make dist`."""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import robustsoup

COMMAND = str(Path(sys.executable).with_name("robustsoup"))


def run_robustsoup(*words: str, folder: str) -> str:
    """Run the installed command and return its standard output."""
    done = subprocess.run(
        [COMMAND, *words], cwd=folder, check=True, capture_output=True, text=True, timeout=900
    )
    return done.stdout


def find_missing_files() -> list[str]:
    """Return the data files that the installed package should hold and does not."""
    package = Path(robustsoup.__file__).parent
    wanted = ["py.typed", "quickstart.toml", "data/digits.npz"]
    missing = [name for name in wanted if not (package / name).is_file()]
    source = Path(__file__).parents[2] / "src" / "robustsoup"
    templates = [
        path.relative_to(source).as_posix()
        for pattern in ("*.html", "*.css", "*.js", "*.jinja", "*.j2", "*.md")
        for path in source.rglob(pattern)
    ]
    return missing + [name for name in templates if not (package / name).is_file()]


def main() -> None:
    """Check the place of the package, its files, --version and the quickstart."""
    if "site-packages" not in robustsoup.__file__:
        sys.exit(f"robustsoup comes from {robustsoup.__file__}, not from the wheel")
    if missing := find_missing_files():
        sys.exit(f"missing from the wheel: {', '.join(missing)}")
    for name in robustsoup.__all__:
        getattr(robustsoup, name)
    with tempfile.TemporaryDirectory() as folder:
        printed = run_robustsoup("--version", folder=folder)
        if version("robustsoup") not in printed:
            sys.exit(f"robustsoup --version printed {printed!r}")
        run_robustsoup("demo", "-o", "quickstart", folder=folder)
        if not (Path(folder) / "quickstart" / "report.html").is_file():
            sys.exit("robustsoup demo wrote no report")
    print("the wheel works")


if __name__ == "__main__":
    main()
