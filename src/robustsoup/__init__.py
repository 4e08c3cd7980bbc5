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
    "Accuracy": "evaluation.intervals",
    "Answer": "soups.answer",
    "AttackSettings": "settings",
    "BufferSettings": "settings",
    "Candidate": "soups.selection",
    "Checkpoint": "checkpoints.checkpoint",
    "Coefficients": "soups.coefficients",
    "Comparison": "evaluation.comparison",
    "Data": "data",
    "Dial": "soups.coefficients",
    "DialSettings": "settings",
    "EarlyStop": "settings",
    "Evaluation": "evaluation.verdicts",
    "Landscape": "diagnosis.landscape",
    "LandscapeSettings": "settings",
    "LayerMap": "diagnosis.layers",
    "LearnSettings": "settings",
    "MergeSettings": "settings",
    "Objective": "training.objectives",
    "Overlap": "data.duplicates",
    "RobustsoupError": "errors",
    "SearchResult": "soups.search",
    "SearchSettings": "settings",
    "Selection": "soups.selection",
    "Soupability": "diagnosis.check",
    "Split": "data",
    "Synthetic": "data",
    "ThreatModel": "threats",
    "TrainSettings": "settings",
    "apgd": "attacks",
    "apgd_train": "attacks",
    "check": "diagnosis.check",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.evaluate",
    "find_overlaps": "data.duplicates",
    "landscape": "diagnosis.landscape",
    "learn": "soups.learning",
    "learn_dial": "soups.learning",
    "load_data": "data",
    "load_model": "models",
    "map_layers": "diagnosis.layers",
    "merge": "soups.merging",
    "mix": "soups.mixing",
    "pareto_front": "soups.selection",
    "pgd": "attacks",
    "search": "soups.search",
    "select": "soups.selection",
    "square": "attacks",
    "track": "tracking",
    "train": "training.train",
    "train_subspace": "soups.subspace",
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
