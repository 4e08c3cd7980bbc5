"""The public surface: which names it has, and that importing them is lazy."""

import ast
import subprocess
import sys
from pathlib import Path

import robustsoup

NAMES = [
    "Accuracy",
    "Answer",
    "AttackSettings",
    "BufferSettings",
    "Candidate",
    "Checkpoint",
    "Coefficients",
    "Comparison",
    "Data",
    "Dial",
    "DialSettings",
    "EarlyStop",
    "Evaluation",
    "Landscape",
    "LandscapeSettings",
    "LayerMap",
    "LearnSettings",
    "MergeSettings",
    "Objective",
    "Overlap",
    "RobustsoupError",
    "SearchResult",
    "SearchSettings",
    "Selection",
    "Soupability",
    "Split",
    "Synthetic",
    "ThreatModel",
    "TrainSettings",
    "apgd",
    "apgd_train",
    "check",
    "compare",
    "evaluate",
    "find_overlaps",
    "landscape",
    "learn",
    "learn_dial",
    "load_data",
    "load_model",
    "map_layers",
    "merge",
    "mix",
    "pareto_front",
    "pgd",
    "search",
    "select",
    "square",
    "track",
    "train",
    "train_subspace",
]


def test_the_public_names_are_these_and_sorted():
    assert robustsoup.__all__ == sorted(NAMES)
    assert all(getattr(robustsoup, name) is not None for name in NAMES)
    assert set(NAMES) <= set(dir(robustsoup))


def test_editors_see_the_same_names_as_users():
    tree = ast.parse(Path(robustsoup.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.name: node.module.removeprefix("robustsoup.")
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == robustsoup._HOMES
    assert sorted(homes) == robustsoup.__all__


def test_importing_the_package_does_not_import_torch():
    script = "import sys, robustsoup; print('torch' in sys.modules, robustsoup.train.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False train\n", done.stderr


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(robustsoup, "no_such_name")
