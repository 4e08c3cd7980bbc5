"""Modules import each other in one order, and the core imports little from outside.

Both are read from the source.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import robustsoup

SOURCE = Path(robustsoup.__file__).parent
# A module belongs to the row of the longest name here that equals the module or its package.
ROOMS = (
    (
        "errors",
        "printable",
        "display",
        "interruption",
        "seeding",
        "schema",
        "stamp",
        "device",
        "precision",
        "gradients",
        "fingerprint",
        "files",
        "documents",
        "file_bytes",
        "file_kinds",
        "archives",
        "pickles",
        "torch_files",
        "arrays",
        "digests",
        "distributed",
        "leftovers",
        "paths",
        "threats",
        "progress",
        "settings",
        "tracking",
        "catalog",
        "user_code",
    ),
    ("attacks",),
    ("data",),
    ("models",),
    ("checkpoints",),
    ("training",),
    ("evaluation",),
    ("soups",),
    ("diagnosis",),
    ("recipes",),
    ("runs",),
    ("reports",),
    ("cli",),
    ("__main__", ""),
)
ROWS = {name: number for number, room in enumerate(ROOMS) for name in room}
CORE = 8
OUTSIDE = {"torch", "numpy"}


def modules():
    """Return the syntax tree of each module by its name below robustsoup ("" for the package)."""
    trees = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


def all_imports(name, tree, known):
    """Yield (absolute name, node) of all imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name or '__init__'}:{node.lineno}: a relative import; expected an absolute one"
            )
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                is_module = target.removeprefix("robustsoup.") in known
                yield (target if is_module else node.module), node


def package_imports(name, tree, known):
    """Yield (name without the leading "robustsoup.", node) of the package's own imports."""
    for imported, node in all_imports(name, tree, known):
        if imported == "robustsoup" or imported.startswith("robustsoup."):
            yield imported.removeprefix("robustsoup").removeprefix("."), node


def row_of_module(name):
    while name not in ROWS:
        name = name.rpartition(".")[0]
        assert name, "top-level module without a row"
    return ROWS[name]


MODULES = modules()


def test_the_source_was_found_and_every_module_has_a_row():
    assert {"errors", "attacks.apgd", "soups.mixing", "cli", "", "soups", "models"} <= set(MODULES)
    top = {name.partition(".")[0] for name in MODULES}
    assert top <= set(ROWS), (
        f"in no row: {sorted(top - set(ROWS))}; add each to architecture.md and to ROWS"
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_to_the_same_row_or_a_lower_one(name):
    for imported, node in package_imports(name, MODULES[name], MODULES):
        assert imported in MODULES, f"{name}:{node.lineno}: robustsoup.{imported} is not a module"
        assert row_of_module(imported) <= row_of_module(name), (
            f"{name or '__init__'}:{node.lineno} (row {row_of_module(name)}) imports {imported} "
            f"(row {row_of_module(imported)})"
        )


def test_there_are_no_cycles():
    graph = {
        name: {imported for imported, _ in package_imports(name, tree, MODULES)} - {name}
        for name, tree in MODULES.items()
    }
    assert "attacks.apgd" in graph["attacks"]
    list(graphlib.TopologicalSorter(graph).static_order())


LAZY = {
    "data.images": "PIL",
    "data.hub": "datasets",
    "data.shards": "webdataset",
    "checkpoints.hub": "huggingface_hub",
    "checkpoints.transfers": "fsspec",
    "attacks.autoattack": "pyautoattack",
}
"""{module: package that it may import, only inside functions and for type checkers}."""


def is_for_type_checkers(block):
    return isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"


def is_lazy(name, imported, node):
    within = [
        block
        for block in ast.walk(MODULES[name])
        if (isinstance(block, ast.FunctionDef) or is_for_type_checkers(block))
        and node in ast.walk(block)
    ]
    return imported.partition(".")[0] == LAZY.get(name) and bool(within)


@pytest.mark.parametrize("name", sorted(name for name in MODULES if row_of_module(name) <= CORE))
def test_the_core_imports_only_torch_and_numpy(name):
    for imported, node in all_imports(name, MODULES[name], MODULES):
        package = imported.partition(".")[0]
        allowed = package in {"robustsoup", *OUTSIDE} or package in sys.stdlib_module_names
        assert allowed or is_lazy(name, imported, node), f"{name}:{node.lineno} imports {imported}"


@pytest.mark.parametrize("name", LAZY)
def test_each_lazy_import_is_still_needed(name):
    lazy = [i for i, node in all_imports(name, MODULES[name], MODULES) if is_lazy(name, i, node)]
    assert lazy, f"the exception for {LAZY[name]} is no longer needed"


def test_the_package_imports_where_only_the_core_is_installed():
    script = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "pydantic", "typer", "rich", "matplotlib", "mpltern", "tomli_w", "filelock", "PIL",
            "pyautoattack",
        }:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import robustsoup
robustsoup.load_data("digits")
robustsoup.load_model("resnet9:width=2")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
