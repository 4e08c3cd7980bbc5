"""Which methods merge, and which settings each reads, for recipes, commands and functions alike."""

from collections.abc import Iterable

from robustsoup.catalog import SOUP_METHODS

NEEDS_MERGING = "merging"
"""The fact "needs" of the methods that merge."""

_MIXED_KEYS = {
    *("method", "ingredients", "buffers", "calibrate_samples", "calibrate_threat", "time_limit"),
}
_GRID_KEYS = _MIXED_KEYS | {"step", "max_soups"}
_LEARNED_KEYS = _MIXED_KEYS | {
    *("threats", "attack_steps", "epochs", "batch_size", "lr", "momentum", "schedule", "detach"),
    *("init", "granularity", "learning_buffers", "seed", "batchnorm"),
    *("accumulate", "recompute_activations", "transform"),
}
_MERGE_KEYS = _GRID_KEYS | {"weights"}
_TASK_KEYS = _MERGE_KEYS | {"scale"}
_MEASURING_KEYS = _MERGE_KEYS | {"threats", "attack_steps", "measure_samples"}
METHOD_KEYS = {
    "uniform": _MIXED_KEYS,
    "grid": _GRID_KEYS,
    "line": _GRID_KEYS,
    "surrogate": _GRID_KEYS | {"tolerance"},
    "greedy": _MIXED_KEYS | {"score"},
    "learned": _LEARNED_KEYS
    | {"objectives", "early_stop", "also", "combine", "affine", "average_last", "clean_limit"},
    "dial": _LEARNED_KEYS | {"dial", "turn_every", "at"},
    "slerp": _MERGE_KEYS,
    "swap": _MERGE_KEYS | {"blocks"},
    "task-arithmetic": _TASK_KEYS,
    "ties": _TASK_KEYS | {"density"},
    "dare": _TASK_KEYS | {"density", "seed"},
    "model-stock": _MIXED_KEYS,
    "fisher": _MEASURING_KEYS | {"seed"},
    "regmean": _MEASURING_KEYS,
}
"""The settings that each method of the catalog reads, which are the keys of [soups.X]."""


def method_keys(method: str) -> set[str]:
    """Return the settings that a method reads; methods of the user's read those of "grid"."""
    return METHOD_KEYS.get(method, _GRID_KEYS)


def is_merge(method: str) -> bool:
    """Return whether a name of the catalog stands for a merging method."""
    entry = SOUP_METHODS.find(method)
    return entry is not None and entry.facts.get("needs") == NEEDS_MERGING


def find_unread(names: Iterable[str], methods: Iterable[object]) -> str | None:
    """Return the first setting that none of the methods reads; None if each is read.

    Args:
        names: Names of settings.
        methods: Methods, by name or as functions of the user's.
    """
    keys = {key for method in methods for key in method_keys(str(method))}
    return next((name for name in names if name not in keys), None)
