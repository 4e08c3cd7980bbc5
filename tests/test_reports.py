import json
import math
from html import escape

import numpy as np
import pytest
import torch
from PIL import Image

from robustsoup.errors import RequestError
from robustsoup.reports import FIGURES, write_report
from robustsoup.reports.results import shown_split, two_best
from robustsoup.reports.style import plain
from robustsoup.reports.tradeoff import curves
from robustsoup.soups.coefficients import Coefficients
from robustsoup.statistics import Accuracy

THREAT = "Linf 8/255"
NAMES = ["eps4", "eps8", "eps16"]
LAYERS = tuple(f"block{i}.{j}.{kind}" for i in range(6) for j, kind in ((0, "weight"), (1, "weight"), (1, "bias")))


def accuracies(clean, robust, n=2000, **more):
    """Synthetic measurements, rounded to whole samples as real ones are."""
    found = {}
    for name, share in {"clean": clean, THREAT: robust, **more}.items():
        entry = Accuracy(round(share * n), n)
        found[name] = {"value": entry.value, "low": entry.low, "high": entry.high, "hits": entry.hits, "n": n}
    return found


def make_row(name, role, clean, robust, **more):
    row = {"soup": None, "ingredients": None, "coefficients": None, "coefficients_file": None, "threat": None,
           "objective": None, "checkpoint": None}  # fmt: skip
    measured = {"val": accuracies(clean + 0.004, robust - 0.003), "test": accuracies(clean, robust)}
    return {"name": name, "role": role, **row, **measured, **more}


def grid_rows(names):
    points = (
        [(i, j, 5 - i - j) for i in range(6) for j in range(6 - i)]
        if len(names) == 3
        else [(i, 5 - i) for i in range(6)]
    )
    clean, robust = np.array([0.78, 0.72, 0.60]), np.array([0.24, 0.31, 0.345])
    rows = []
    for point in points:
        alpha = np.array(point) / 5
        bend = 0.03 * (1 - (alpha**2).sum())
        rows.append(make_row(
            "grid-" + "-".join(f"{a:g}" for a in alpha), "grid", alpha @ clean[: len(names)] + bend,
            alpha @ robust[: len(names)] + bend / 3, soup="grid", ingredients=names, coefficients=alpha.tolist(),
        ))  # fmt: skip
    return rows


def learned_rows(folder):
    rows = []
    for k, (threat, clean, robust) in enumerate([
        ("Linf 16/255", 0.61, 0.352), ("clean", 0.80, 0.21), ("Linf 2/255", 0.79, 0.245), ("Linf 4/255", 0.775, 0.28),
        ("Linf 8/255", 0.715, 0.33),
    ]):  # fmt: skip
        file = f"coefficients/learned-{k}.safetensors"
        tilt = torch.linspace(-1, 1, 3, dtype=torch.float64) * (k - 2)
        noise = torch.randn(len(LAYERS), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        (folder / "coefficients").mkdir(exist_ok=True)
        Coefficients(torch.softmax(noise + tilt, 1), LAYERS).save(folder / file)
        more = {"soup": "learned", "ingredients": NAMES, "coefficients_file": file, "threat": threat, "objective": "ce"}
        rows.append(make_row("learned-" + threat.replace(" ", "-"), "learned", clean, robust, **more))
    return rows


def make_results(folder, names=NAMES):
    """A synthetic run folder: no network was trained for these numbers."""
    rows = [
        make_row("pretrained", "pretrained", 0.70, 0.32, threat=THREAT),
        make_row("eps4", "ingredient", 0.78, 0.24, threat="Linf 4/255"),
        make_row("eps8", "ingredient", 0.72, 0.31, threat="Linf 8/255"),
        make_row("eps16", "ingredient", 0.60, 0.345, threat="Linf 16/255"),
        *grid_rows(names),
        make_row("uniform", "uniform", 0.72, 0.305, soup="uniform", ingredients=NAMES, coefficients=[1 / 3] * 3),
        *learned_rows(folder),
    ]
    return {
        "name": "eps-soups", "created": "2026-11-22T19:00:00Z", "recipe": {"name": "eps-soups", "seed": 0},
        "data": {"name": "synthetic", "classes": 10, "split_digest": "abc123", "seed": 3}, "model": "resnet9:width=16",
        "leakage": {"status": "known", "why": ""}, "figures": ["ternary", "tradeoff", "coefficients"],
        "protocol": {
            "attack": "apgd", "loss": "ce", "steps": 50, "restarts": 1, "precision": "float32", "seed": 0,
            "select_on": "val", "report_on": "test", "samples": {"val": 2000, "test": 2000}, "threats": [THREAT],
        },
        "versions": {"robustsoup": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "device": "cpu", "threads": 2},
        "seconds": 1234.5, "rows": rows,
        "selection": {
            "maximise": THREAT, "require": ["clean>=0.7"], "met": True, "chosen": "learned-Linf-8/255", "point": False,
            "message": "", "held_on_test": True,
        },
    }  # fmt: skip


def report(folder, results):
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")
