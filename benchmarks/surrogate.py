"""Regret against cost of ways to choose a soup, replayed from stored verdicts.

    python benchmarks/surrogate.py                                replay docs/evidence/*.npz
    python benchmarks/surrogate.py --small                        make and replay a tiny grid
    python benchmarks/surrogate.py --pack RUN_DIR -o TABLE.npz    pack the grid of a run folder
    python benchmarks/surrogate.py --digits N -o TABLE.npz        make a grid of N on digits

A table holds the verdicts of every soup of a grid on the same samples, so each way can be replayed
without a network: `grid` attacks every soup, `surrogate` and `quadratic` those that the engine asks
for, `spread` as many as the surrogate, spread evenly, without a model. Every way chooses on a
random half of the samples; its regret is the robust accuracy of the full grid's choice minus that
of its own, on the same half and on the other one. Goals: the most robust soup, and the most robust
one with clean accuracy above the quartiles of the grid. Each face of a grid (one coefficient is 0)
is a grid of its own. Times are those of the evaluations as stored, and of the model's work here.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import describe_machine
from numpy.typing import NDArray

import robustsoup as rs
from robustsoup.evaluation.hit_tables import HitTable
from robustsoup.runs.results import Results
from robustsoup.soups.goal import Goal
from robustsoup.soups.grid import alpha_name, candidates
from robustsoup.soups.surrogate import Model, spread_rows
from robustsoup.soups.surrogate_search import SurrogateSearch

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
QUANTILES = (None, 0.25, 0.5, 0.75)
"""Required clean accuracy, as a quantile of the clean accuracies of the grid."""
WAYS: tuple[Model, ...] = ("gaussian-process", "quadratic")
LABELS = {"gaussian-process": "surrogate", "quadratic": "quadratic", "spread": "spread evenly"}


@dataclass(frozen=True)
class Case:
    """One choice: a grid, a half of its samples, and a requirement.

    Attributes:
        table: The verdicts.
        threat: The measure to maximise.
        half: (samples,) bool, the samples that choose.
        clean: Required clean accuracy; None for no requirement.
        seed: Seed of the engine.
    """

    table: HitTable
    threat: str
    half: NDArray[np.bool_]
    clean: float | None
    seed: int

    @property
    def eligible(self) -> NDArray[np.bool_]:
        """(N,) whether the estimates of clean accuracy meet the requirement."""
        shares = self.table.hits["clean"][:, self.half].mean(1)
        return shares >= (self.clean or 0)

    def choose(self, rows: list[int]) -> int:
        """Return the most robust eligible soup of some rows, by the samples that choose."""
        eligible = [row for row in rows if self.eligible[row]] or rows
        robust = self.table.hits[self.threat][:, self.half].mean(1)
        return max(eligible, key=lambda row: robust[row])

    def regret(self, row: int, best: int) -> tuple[float, float]:
        """Return the regret in points, on the samples that choose and on the others."""
        hits = self.table.hits[self.threat]
        lost = hits[best].astype(float) - hits[row]
        return 100 * float(lost[self.half].mean()), 100 * float(lost[~self.half].mean())

    def run_engine(self, model: Model) -> tuple[list[int], float]:
        """Return the rows that the engine attacks, and the seconds of its decisions."""
        table, half = self.table, self.half
        clean = [
            rs.Accuracy(int(row.sum()), int(half.sum())) for row in table.hits["clean"][:, half]
        ]
        search = SurrogateSearch(
            table.names,
            tuple(tuple(map(float, row)) for row in table.coefficients),
            tuple(clean),
            Goal.parse(self.threat),
            shortfall=tuple(max((self.clean or 0) - a.value, 0.0) for a in clean),
            seed=self.seed,
            model=model,
        )
        started = time.perf_counter()
        attacked: dict[str, Mapping[str, NDArray[np.bool_]]] = {}
        while names := search.next_soups(attacked):
            for name in names:
                attacked[name] = {self.threat: table.row(name)[self.threat][half]}
        return [table.names.index(name) for name in attacked], time.perf_counter() - started

    def spread(self, count: int) -> list[int]:
        """Return `count` rows: the ingredients and soups spread evenly."""
        search = SurrogateSearch(
            self.table.names,
            tuple(tuple(map(float, row)) for row in self.table.coefficients),
            (rs.Accuracy(1, 1),) * len(self.table.names),
            Goal.parse(self.threat),
        )
        corners = list(search.first_rows[: self.table.coefficients.shape[1]])
        return [*corners, *spread_rows(search.places, corners, count - len(corners))]


def list_faces(table: HitTable) -> Iterator[tuple[str, HitTable]]:
    """Yield the whole grid, and each face of three ingredients with its own coefficients."""
    n = table.coefficients.shape[1]
    yield f"all {n}", table
    for face in itertools.combinations(range(n), 3) if n > 3 else ():
        others = [i for i in range(n) if i not in face]
        rows = [row for row, a in enumerate(table.coefficients) if not a[others].any()]
        part = table.take(rows)
        alphas = part.coefficients[:, list(face)]
        yield (
            "ingredients " + ", ".join(str(i + 1) for i in face),
            HitTable(part.names, alphas, part.ids, part.hits, part.record),
        )


def list_cases(table: HitTable, threat: str, halves: int) -> Iterator[Case]:
    """Yield the cases of one grid."""
    samples = len(table.ids)
    for seed in range(halves):
        order = np.random.default_rng([seed, samples]).permutation(samples)
        half = np.zeros(samples, dtype=bool)
        half[order[: samples // 2]] = True
        clean = table.hits["clean"][:, half].mean(1)
        for quantile in QUANTILES:
            limit = None if quantile is None else float(np.quantile(clean, quantile))
            yield Case(table, threat, half, limit, seed)


def replay_grid(title: str, table: HitTable, threat: str, halves: int) -> dict[str, float]:
    """Replay all ways on one grid, print a row for each, and return the surrogate's attacks."""
    results: dict[str, list[tuple[int, float, float, float]]] = {name: [] for name in LABELS}
    for case in list_cases(table, threat, halves):
        everything = list(range(len(table.names)))
        best = case.choose(everything)
        attacked: dict[str, tuple[list[int], float]] = {m: case.run_engine(m) for m in WAYS}
        attacked["spread"] = (case.spread(len(attacked["gaussian-process"][0])), 0.0)
        for name, (rows, seconds) in attacked.items():
            results[name].append((len(rows), *case.regret(case.choose(rows), best), seconds))
    total = len(table.names)
    costs = table.record.get("seconds", {})
    for name, runs in results.items():
        counts, same, other, seconds = zip(*runs, strict=True)
        mean = statistics.mean(counts)
        beyond = sum(regret > 0.5 for regret in same) / len(same)
        time_text = "-"
        if costs:
            whole = total * (costs["clean"] + costs["attack"])
            own = total * costs["clean"] + mean * costs["attack"] + statistics.mean(seconds)
            time_text = f"{own / whole:.2f}"
        print(
            f"| {title} | {LABELS[name]} | {mean:.1f} of {total} ({mean / total:.0%}), "
            f"{min(counts)} to {max(counts)} | {time_text} | {describe(same)} | {beyond:.0%} | "
            f"{describe(other)} |",
            flush=True,
        )
    return {name: statistics.mean(run[0] for run in runs) / total for name, runs in results.items()}


def describe(regrets: tuple[float, ...]) -> str:
    """Return the mean with its 95 % interval over the cases, and the largest."""
    half = 1.96 * statistics.stdev(regrets) / len(regrets) ** 0.5 if len(regrets) > 1 else 0.0
    return f"{statistics.mean(regrets):+.2f} ± {half:.2f}, at most {max(regrets):+.1f}"


def replay(table: HitTable, name: str, halves: int) -> None:
    """Print the table of one stored grid: one row for each face and way."""
    threats = [key for key in table.hits if key not in ("clean", "union")]
    record = table.record
    print(
        f"\n**{name}** ({record.get('data')}, {record.get('model')}; {len(table.ids):,} samples; "
        f"{record.get('attack')})\n\n"
        "| grid | way | soups attacked | seconds, grid = 1 | regret, same samples "
        "| above 0.5 | regret, other samples |\n|---|---|---|---|---|---|---|"
    )
    for threat, (face, part) in itertools.product(threats, list_faces(table)):
        title = face if len(threats) == 1 else f"{threat}, {face}"
        replay_grid(title, part, threat, halves)


def pack_run(folder: Path) -> HitTable:
    """Return the verdicts of the grid of a run folder on the split that selects."""
    results = Results.load(folder / "results.json")
    rows = [row for row in results.rows if row.role == "grid"]
    evaluations = {
        row.name: rs.Evaluation.load(folder / "evaluations" / f"{row.name}.val.json")
        for row in rows
    }
    protocol, first = results.protocol, next(iter(evaluations.values()))
    passes = [item.record["seconds"] for item in evaluations.values()]
    record = {
        "data": results.data["name"],
        "model": results.model,
        "ingredients": list(rows[0].ingredients or ()),
        "attack": f"{protocol.attack}-{protocol.loss}, {protocol.steps} steps, "
        f"{protocol.restarts} restart(s), searched in {protocol.search_precision}",
        "split": protocol.select_on,
        "torch": first.record["torch"],
        "seconds": {"attack": statistics.median(passes), "clean": 0.0},
    }
    return HitTable.of(evaluations, [row.coefficients or () for row in rows], record)


DIGITS_THREATS = ("Linf 16/255", "Linf 64/255", "Linf 96/255", "L2 1")


def make_digits_grid(n: int, *, step: float, epochs: int, steps: int, seed: int = 0) -> HitTable:
    """Train n ingredients on digits, and evaluate the grid of their soups on val and test."""
    data, threat = rs.load_data("digits", seed=seed), "Linf 56/255"
    network = rs.load_model("resnet9:width=4", channels=1, seed=seed)
    base = rs.train(network, data.train, threat=threat, epochs=2 * epochs, lr=0.1, seed=seed)
    ingredients = [
        rs.train(base, data.train, threat=item, epochs=epochs, lr=0.05, seed=seed)
        for item in DIGITS_THREATS[:n]
    ]
    alphas, parts = candidates("grid", n, step), []
    seconds = {"attack": 0.0, "clean": 0.0}
    for split in (data.val, data.test):
        evaluations: dict[str, rs.Evaluation] = {}
        for alpha in alphas:
            soup = rs.mix(ingredients, alpha)
            started = time.perf_counter()
            rs.evaluate(soup, split)
            middle = time.perf_counter()
            evaluations[alpha_name(alpha)] = rs.evaluate(soup, split, [threat], steps=steps)
            seconds["clean"] += (middle - started) / len(alphas)
            seconds["attack"] += (time.perf_counter() - middle) / len(alphas)
        parts.append(HitTable.of(evaluations, alphas))
    val, test = parts
    record = {
        "data": "digits",
        "model": "resnet9:width=4",
        "ingredients": list(DIGITS_THREATS[:n]),
        "attack": f"apgd-ce, {steps} steps, 1 restart",
        "split": "val and test",
        "seconds": seconds,
    }
    hits = {key: np.concatenate([val.hits[key], test.hits[key]], 1) for key in val.hits}
    return HitTable(val.names, val.coefficients, np.concatenate([val.ids, test.ids]), hits, record)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", type=Path, help="tables; docs/evidence/ by default")
    parser.add_argument("--pack", type=Path, help="run folder whose grid is packed into -o")
    parser.add_argument("--digits", type=int, choices=(3, 4), help="make a grid on digits into -o")
    parser.add_argument("--seed", type=int, default=0, help="seed of --digits, default 0")
    parser.add_argument("-o", "--output", type=Path, help="table to write")
    parser.add_argument("--halves", type=int, default=10, help="random halves, default 10")
    parser.add_argument("--small", action="store_true", help="run in seconds on digits")
    return parser.parse_args()


def main() -> None:
    """Pack, make or replay tables."""
    options = parse_options()
    if options.pack:
        print(pack_run(options.pack).save(options.output))
        return
    if options.digits:
        table = make_digits_grid(options.digits, step=0.2, epochs=8, steps=20, seed=options.seed)
        print(table.save(options.output))
        return
    print(describe_machine())
    if options.small:
        replay(make_digits_grid(3, step=0.25, epochs=1, steps=2), "digits, small", halves=1)
        return
    for path in options.tables or sorted(EVIDENCE.glob("*.npz")):
        replay(HitTable.load(path), path.stem, options.halves)


if __name__ == "__main__":
    main()
