"""Turn adversarially fine-tuned checkpoints of one network into one, at the trade-off you need.

    import robustsoup as rs

    data = rs.load_data("cifar10")
    soup = rs.mix(["eps4.safetensors", "eps16.safetensors"], [0.5, 0.5])
    print(rs.evaluate(soup, data.test, ["Linf 8/255"]).accuracy)

Names are imported when they are first used, so `import robustsoup` is quick and does not load
PyTorch by itself.
"""

import importlib

# Importing `typing` takes as long as all else before the command line handles signals. Type
# checkers know the name; jedi, which completes names in notebooks, skips the block of a literal.
TYPE_CHECKING = bool()  # noqa: UP018
if TYPE_CHECKING:
    from robustsoup.attacks import apgd, apgd_train, pgd, square
    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.data import Data, Split, Synthetic, load_data
    from robustsoup.data.duplicates import Overlap, find_overlaps
    from robustsoup.diagnosis.check import Soupability, check
    from robustsoup.diagnosis.landscape import Landscape, landscape
    from robustsoup.diagnosis.layers import LayerMap, map_layers
    from robustsoup.errors import RobustsoupError
    from robustsoup.evaluation.comparison import Comparison, compare
    from robustsoup.evaluation.evaluate import evaluate
    from robustsoup.evaluation.intervals import Accuracy
    from robustsoup.evaluation.verdicts import Evaluation
    from robustsoup.models import load_model
    from robustsoup.settings import (
        AttackSettings,
        BufferSettings,
        DialSettings,
        EarlyStop,
        LandscapeSettings,
        LearnSettings,
        MergeSettings,
        SearchSettings,
        TrainSettings,
    )
    from robustsoup.soups.answer import Answer
    from robustsoup.soups.coefficients import Coefficients, Dial
    from robustsoup.soups.learning import learn, learn_dial
    from robustsoup.soups.merging import merge
    from robustsoup.soups.mixing import mix
    from robustsoup.soups.search import SearchResult, search
    from robustsoup.soups.selection import Candidate, Selection, pareto_front, select
    from robustsoup.soups.subspace import train_subspace
    from robustsoup.threats import ThreatModel
    from robustsoup.tracking import track
    from robustsoup.training.objectives import Objective
    from robustsoup.training.train import train

_HOMES = {
    name: home
    for home, names in {
        "attacks": "apgd apgd_train pgd square",
        "checkpoints.checkpoint": "Checkpoint",
        "data": "Data Split Synthetic load_data",
        "data.duplicates": "Overlap find_overlaps",
        "diagnosis.check": "Soupability check",
        "diagnosis.landscape": "Landscape landscape",
        "diagnosis.layers": "LayerMap map_layers",
        "errors": "RobustsoupError",
        "evaluation.comparison": "Comparison compare",
        "evaluation.evaluate": "evaluate",
        "evaluation.intervals": "Accuracy",
        "evaluation.verdicts": "Evaluation",
        "models": "load_model",
        "settings": "AttackSettings BufferSettings DialSettings EarlyStop LandscapeSettings "
        "LearnSettings MergeSettings SearchSettings TrainSettings",
        "soups.answer": "Answer",
        "soups.coefficients": "Coefficients Dial",
        "soups.learning": "learn learn_dial",
        "soups.merging": "merge",
        "soups.mixing": "mix",
        "soups.search": "SearchResult search",
        "soups.selection": "Candidate Selection pareto_front select",
        "soups.subspace": "train_subspace",
        "threats": "ThreatModel",
        "tracking": "track",
        "training.objectives": "Objective",
        "training.train": "train",
    }.items()
    for name in names.split()
}

__all__ = [
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


def __getattr__(name: str) -> object:
    """Import a public name from its home and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *__all__})
