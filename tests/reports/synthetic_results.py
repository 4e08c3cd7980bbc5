"""Synthetic results of a run, as the dictionaries of results.json; no network was run for them."""

import json

import numpy as np
import torch

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.reports import StoredRun, write_report
from robustsoup.runs.examples import AttackedExamples, Examples
from robustsoup.runs.results import ResultRow, Results
from robustsoup.soups.coefficients import Coefficients

THREAT = "Linf 8/255"
NAMES = ["eps4", "eps8", "eps16"]
LAYERS = tuple(f"block{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))
CORNERS = np.array([[0.0, 0.0], [1.6, 3.0], [4.0, 0.0]])


def make_accuracies(clean, robust, n=2000):
    """Make accuracies of whole samples, as measured ones are."""
    return {
        name: Accuracy(round(share * n), n).to_json()
        for name, share in {"clean": clean, THREAT: robust}.items()
    }


def make_row(name, role, clean, robust, **fields):
    accuracies = {
        "val": make_accuracies(clean + 0.004, robust - 0.003),
        "test": make_accuracies(clean, robust),
    }
    return {"name": name, "role": role, **accuracies, **fields}


def parse_row(row):
    return ResultRow.from_json(row, row["name"])


def make_grid_rows(names):
    """Make the soups of a grid with steps of 1/5 over two or three ingredients."""
    points = [(i, j, 5 - i - j) for i in range(6) for j in range(6 - i)]
    if len(names) == 2:
        points = [(i, 5 - i) for i in range(6)]
    clean, robust = np.array([0.78, 0.72, 0.60]), np.array([0.24, 0.31, 0.345])
    rows = []
    for point in points:
        alpha = np.array(point) / 5
        bend = 0.03 * (1 - (alpha**2).sum())
        row = make_row(
            "grid-" + "-".join(f"{a:g}" for a in alpha),
            "grid",
            alpha @ clean[: len(names)] + bend,
            alpha @ robust[: len(names)] + bend / 3,
            soup="grid",
            ingredients=names,
            coefficients=alpha.tolist(),
            ingredient=names[int(alpha.argmax())] if alpha.max() == 1 else None,
        )
        rows.append(row)
    return rows


def make_coefficients(layers, n, *, seed=0, tilt=0.0):
    """Make coefficients that moved more in deeper layers; the first layer has slope 0."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.linspace(0, 1, len(layers), dtype=torch.float64)[:, None]
    start = 0.01 * torch.randn(len(layers), n, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(layers), n, dtype=torch.float64, generator=generator)
    slopes = 10 ** (3 * depth[:, 0] - 4)
    slopes[0] = 0
    return Coefficients(
        torch.softmax(start + depth * (noise + tilt), 1),
        tuple(layers),
        start=torch.softmax(start, 1),
        slopes=slopes,
    )


def make_learned_rows(folder):
    """Make learned soups, not in order of eps, with their files of coefficients."""
    rows = []
    for k, (threat, clean, robust) in enumerate(
        [("Linf 16/255", 0.61, 0.352), ("clean", 0.80, 0.21), ("Linf 8/255", 0.715, 0.33)]
    ):
        file = f"coefficients/learned-{k}.safetensors"
        (folder / "coefficients").mkdir(exist_ok=True)
        tilt = torch.linspace(-1, 1, 3, dtype=torch.float64) * (k - 1)
        make_coefficients(LAYERS, 3, seed=k, tilt=tilt).save(folder / file)
        row = make_row(
            "learned-" + threat.replace(" ", "-"),
            "learned",
            clean,
            robust,
            soup="learned",
            ingredients=NAMES,
            coefficients_file=file,
            threat=threat,
            objective="ce",
        )
        rows.append(row)
    return rows


def make_results(folder, names=NAMES):
    """Make the results of a run with a grid, a uniform soup and learned soups."""
    uniform = {"soup": "uniform", "ingredients": NAMES, "coefficients": [1 / 3] * 3}
    rows = [
        make_row("pretrained", "pretrained", 0.70, 0.32, threat=THREAT),
        make_row("eps4", "ingredient", 0.78, 0.24, threat="Linf 4/255"),
        make_row("eps8", "ingredient", 0.72, 0.31, threat="Linf 8/255"),
        make_row("eps16", "ingredient", 0.60, 0.345, threat="Linf 16/255"),
        *make_grid_rows(names),
        make_row("uniform", "uniform", 0.72, 0.305, **uniform),
        *make_learned_rows(folder),
    ]
    return {
        "name": "eps-soups",
        "created": "2026-11-22T19:00:00Z",
        "recipe": {"name": "eps-soups", "seed": 0},
        "data": {"name": "synthetic", "classes": 10, "split_digest": "abc123", "seed": 3},
        "model": "resnet9:width=16",
        "leakage": {"status": "known", "why": ""},
        "figures": ["ternary", "tradeoff", "coefficients"],
        "protocol": {
            "attack": "apgd",
            "loss": "ce",
            "steps": 50,
            "restarts": 1,
            "precision": "float32",
            "seed": 0,
            "select_on": "val",
            "report_on": "test",
            "samples": {"val": 2000, "test": 2000},
            "threats": [THREAT],
        },
        "versions": {
            "robustsoup": "0.1.0",
            "torch": "2.13.0",
            "python": "3.11.7",
            "device": "cpu",
            "threads": 2,
        },
        "seconds": 1234.5,
        "rows": rows,
        "selection": {
            "maximise": THREAT,
            "require": ["clean>=0.7"],
            "met": True,
            "chosen": "learned-Linf-8/255",
            "point": False,
            "test": [make_check("clean>=0.7", 0.75, 2000)],
        },
    }


def make_check(require, share, n):
    """Return whether a requirement is met, as results.json has it."""
    hits = round(share * n)
    estimate = Accuracy(hits, n).to_json()
    return {"require": require, "estimate": estimate, "low": share - 0.02, "met": True}


def add_dial_and_greedy(folder, results):
    """Add three soups of a dial, out of order, and a greedy soup."""
    for t, clean, robust in [(1, 0.80, 0.22), (0, 0.62, 0.35), (0.7, 0.77, 0.27)]:
        file = f"coefficients/dial-{t:g}.safetensors"
        make_coefficients(LAYERS, 3, seed=9, tilt=torch.tensor([t, 0, -t])).save(folder / file)
        row = make_row(
            f"dial-{t:g}",
            "dial",
            clean,
            robust,
            soup="dial",
            ingredients=NAMES,
            coefficients_file=file,
            threat=THREAT,
            at=t,
        )
        results["rows"].append(row)
    file = "coefficients/greedy.safetensors"
    Coefficients.of([0.5, 0.5, 0]).save(folder / file)
    row = make_row(
        "greedy",
        "greedy",
        0.76,
        0.29,
        soup="greedy",
        ingredients=NAMES,
        coefficients=[0.5, 0.5, 0],
        coefficients_file=file,
    )
    results["rows"].append(row)


def write_evaluations(folder, results):
    """Store verdicts on both splits for the chosen row and the ingredients."""
    chosen = results["selection"]["chosen"]
    (folder / "evaluations").mkdir(exist_ok=True)
    for row in results["rows"]:
        if row["role"] != "ingredient" and row["name"] != chosen:
            continue
        row["name"] = row["name"].replace("/", "-")
        for split in ("val", "test"):
            hits = {name: entry["hits"] for name, entry in row[split].items()}
            n = row[split]["clean"]["n"]
            labels = torch.zeros(n, dtype=torch.long)
            zeros = torch.zeros(n)
            verdicts = Verdicts(torch.arange(n) < hits[THREAT], labels, labels, zeros, zeros)
            evaluation = Evaluation(
                torch.arange(n),
                labels,
                (torch.arange(n) >= hits["clean"]).long(),
                zeros,
                {THREAT: verdicts},
                {
                    "threats": [THREAT],
                    "broken_by": ["clean"],
                    "data": {"name": "x", "digest": "d"},
                    "split": split,
                },
            )
            evaluation.save(folder / "evaluations" / f"{row['name']}.{split}.json")
    results["selection"]["chosen"] = chosen.replace("/", "-")


def write_examples(folder, results):
    """Store four attacked samples; the second is robust, the third wrong without an attack."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    delta = (torch.rand(4, 3, 8, 8, generator=generator) - 0.5).to(torch.float16) / 16
    robust = torch.tensor([False, True, False, False])
    attacked = AttackedExamples(delta, torch.tensor([3, 1, 7, 4]), robust)
    labels, prediction = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 7, 3])
    Examples(images, labels, prediction, (attacked,)).save(folder / "examples.npz")
    chosen = results["selection"]["chosen"]
    results["examples"] = {"network": chosen, "split": "test", "file": "examples.npz"}


def make_line_rows(section, first, second, ends, bend):
    """Make six rows from one network to another, bent outward by `bend`."""
    rows = []
    for k in range(6):
        a = k / 5
        clean, robust = (1 - a) * np.array(ends[0]) + a * np.array(ends[1]) + bend * a * (1 - a)
        row = make_row(
            f"{section}-{1 - a:.1f}-{a:.1f}",
            "line",
            clean,
            robust,
            soup=section,
            ingredients=[first, second],
            coefficients=[1 - a, a],
        )
        rows.append(row)
    return rows[::-1]  # as grids are ordered


def make_all_line_rows():
    """Make a line from the base to each ingredient."""
    base = (0.70, 0.32)
    ends = {"eps4": (0.78, 0.24), "eps8": (0.72, 0.31), "eps16": (0.60, 0.345)}
    return [
        row
        for name, end in ends.items()
        for row in make_line_rows(f"line-{name}", "pretrained", name, (base, end), 0.05)
    ]


def write_plane(folder, name, checkpoints, *, wells=1, **content):
    """Write a plane whose loss is a bowl, with a second well if `wells` is 2.

    Returns its entry of results.json.
    """
    x, y = np.linspace(-0.2, 1.2, 21) * 4.0, np.linspace(-0.2, 1.2, 21) * 3.0
    xx, yy = np.meshgrid(x, y)
    loss = 1.45 + 0.04 * ((xx - 1.9) ** 2 + (yy - 1) ** 2) + 0.02 * np.maximum(xx + yy - 5, 0) ** 3
    if wells == 2:
        loss -= 0.3 * np.exp(-3 * ((xx - 3.1) ** 2 + (yy - 0.4) ** 2))
    plane = {
        "name": name,
        "checkpoints": checkpoints,
        "x": x.tolist(),
        "y": y.tolist(),
        "positions": CORNERS.tolist(),
        "loss": loss.tolist(),
        "accuracy": np.exp(-loss).tolist(),
        "threat": THREAT,
        "attack_steps": 10,
        "samples": 2000,
        "split": "test",
        "buffers": "recalibrate",
        "seed": 0,
        "precision": "float32",
    }
    file = f"landscapes/{name}.json"
    (folder / "landscapes").mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(plane | content), encoding="utf-8")
    return {"name": name, "checkpoints": checkpoints, "file": file}


def write_all_planes(folder):
    """Write three planes, one of them with two wells."""
    wells = {"eps4": 1, "eps16": 2, "l2": 1}
    return [
        write_plane(folder, f"plane-{name}", ["pretrained", "eps8", name], wells=number)
        for name, number in wells.items()
    ]


def make_all_results(folder):
    """Make results that every figure and view applies to."""
    results = make_results(folder)
    write_evaluations(folder, results)
    write_examples(folder, results)
    results["rows"] += make_all_line_rows()
    results["planes"] = write_all_planes(folder)
    return results


def stored_run(folder, results):
    return StoredRun(Results.from_json(results, "results.json"), folder)


def write_and_read_report(folder, results):
    """Write results.json and the report; returns the page."""
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def small_print(plot):
    return plot.figure.get_supxlabel().replace("\n", " ")


def axes_by_label(figure):
    """Group the axes of a figure by the label of their x axis."""
    groups = {}
    for axes in figure.axes:
        groups.setdefault(axes.get_xlabel(), []).append(axes)
    return groups


def assert_inside_figure(figure, boxes):
    width, height = figure.bbox.size
    for box in boxes:
        assert min(box.x0, box.y0) >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
