"""Regret against cost of ways to choose a soup, replayed from stored verdicts.

    python benchmarks/surrogate.py                                replay docs/evidence/*.npz
    python benchmarks/surrogate.py --small                        make and replay a tiny grid
    python benchmarks/surrogate.py --pack RUN_DIR -o TABLE.npz    pack the grid of a run folder
    python benchmarks/surrogate.py --make cifar10 -o TABLE.npz    train and evaluate a small grid
    python benchmarks/surrogate.py --simulate                     smooth maps with known verdicts

A table holds the verdicts of every soup of a grid on the same samples, so each way can be replayed
without a network: `grid` attacks every soup, `surrogate` and `quadratic` those that the engine asks
for, `spread` as many as the surrogate, spread evenly, without a model; `racing` attacks the soups
that meet the requirement in 16 rounds and drops those that have lost, with clean verdicts in the
place of a brief attack. Every way chooses on a
random half of the samples; its regret is the robust accuracy of the full grid's choice minus that
of its own, on the same half and on the other one. Goals: the most robust soup, and the most robust
one with clean accuracy above the quartiles of the grid. Each face of a grid (one coefficient is 0)
is a grid of its own. Times are those of the evaluations as stored, and of the model's work here.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe_machine
from numpy.typing import NDArray
from torch import nn

import robustsoup as rs
from robustsoup.data import Split
from robustsoup.evaluation.hit_tables import HitTable
from robustsoup.evaluation.two_phase import estimate_accuracy, sample_order
from robustsoup.files import cache_folder
from robustsoup.runs.results import Results
from robustsoup.soups.goal import Goal
from robustsoup.soups.grid import alpha_name, candidates
from robustsoup.soups.racing import Race
from robustsoup.soups.surrogate import Model, spread_rows
from robustsoup.soups.surrogate_search import SurrogateSearch

LINF_8 = "Linf 8/255"
EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
QUANTILES = (None, 0.25, 0.5, 0.75)
"""Required clean accuracy, as a quantile of the clean accuracies of the grid."""
WAYS: tuple[Model, ...] = ("gaussian-process", "quadratic")
LABELS = {
    "gaussian-process": "surrogate",
    "quadratic": "quadratic",
    "spread": "spread evenly",
    "racing": "racing",
}


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
        eligible = [row for row in sorted(rows) if self.eligible[row]] or rows
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

    def run_race(self) -> tuple[float, int]:
        """Race the eligible soups; return what was attacked, in soups, and the winner's row.

        The stored tables hold no brief attack, so a clean pass takes its place.
        """
        n = int(self.half.sum())
        order = torch.from_numpy(np.flatnonzero(self.half))[sample_order(torch.arange(n), seed=0)]
        clean, full = (
            torch.from_numpy(self.table.hits[key])[:, order] for key in ("clean", self.threat)
        )
        rows = [row for row in range(len(self.table.names)) if self.eligible[row]]
        length = max(n // 16, 1)
        ends = dict.fromkeys(rows, length)

        def count(row: int) -> rs.Accuracy:
            attacked = torch.arange(n) < ends[row]
            missed = int((clean[row] & ~full[row])[attacked].sum())
            return estimate_accuracy(torch.where(attacked, full[row], clean[row]), attacked, missed)

        while True:
            hits = {row: int(full[row].sum()) for row in rows if ends[row] >= n}
            race = Race(len(rows), max(hits.values(), default=None), 0.05)
            scores = {row: count(row) for row in rows if row not in hits}
            running = [row for row, score in scores.items() if not race.has_lost(score)]
            if not running:
                return sum(ends.values()) / n, max(hits, key=lambda row: hits[row])
            favourite = max(running, key=lambda row: scores[row].value)
            ends[favourite] = min(ends[favourite] + length, n) if hits else n

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
    results: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in LABELS}
    for case in list_cases(table, threat, halves):
        everything = list(range(len(table.names)))
        best = case.choose(everything)
        attacked: dict[str, tuple[list[int], float]] = {m: case.run_engine(m) for m in WAYS}
        attacked["spread"] = (case.spread(len(attacked["gaussian-process"][0])), 0.0)
        for name, (rows, seconds) in attacked.items():
            results[name].append((len(rows), *case.regret(case.choose(rows), best), seconds))
        cost, winner = case.run_race()
        results["racing"].append((cost, *case.regret(winner, best), 0.0))
    total = len(table.names)
    costs = table.record.get("seconds", {})
    for name, runs in results.items():
        counts, same, other, seconds = zip(*runs, strict=True)
        mean = statistics.mean(counts)
        beyond = sum(regret > 0.5 for regret in same) / len(same)
        time_text = "-"
        if "clean" in costs:
            whole = total * (costs["clean"] + costs["attack"])
            own = total * costs["clean"] + mean * costs["attack"] + statistics.mean(seconds)
            time_text = f"{own / whole:.2f}"
        cells = [
            title,
            LABELS[name],
            f"{mean:.1f} of {total} ({mean / total:.0%}), {min(counts):.0f} to {max(counts):.0f}",
            time_text,
            describe(same),
            f"{beyond:.0%}",
            describe(other),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return {name: statistics.mean(run[0] for run in runs) / total for name, runs in results.items()}


def describe(regrets: tuple[float, ...]) -> str:
    """Return the mean with its 95 % interval over the cases, and the largest."""
    half = 1.96 * statistics.stdev(regrets) / len(regrets) ** 0.5 if len(regrets) > 1 else 0.0
    return f"{statistics.mean(regrets):+.2f} ± {half:.2f}, at most {max(regrets):+.1f}"


def replay(table: HitTable, name: str, halves: int, *, faces: bool = True) -> None:
    """Print the table of one stored grid: one row for each face and way."""
    threats = [key for key in table.hits if key not in ("clean", "union")]
    record = table.record
    print(
        f"\n**{name}** ({record.get('data')}, {record.get('model')}; {len(table.ids):,} samples; "
        f"{record.get('attack')})\n\n"
        "| grid | way | soups attacked | seconds, grid = 1 | regret, same samples "
        "| above 0.5 | regret, other samples |\n|---|---|---|---|---|---|---|"
    )
    grids = list(list_faces(table))[: None if faces else 1]
    for threat, (face, part) in itertools.product(threats, grids):
        title = face if len(threats) == 1 else f"{threat}, {face}"
        replay_grid(title, part, threat, halves)


def pack_run(folder: Path) -> HitTable:
    """Return the verdicts of the grid of a run folder: on val, and on test if all were reported."""
    results = Results.load(folder / "results.json")
    rows = [row for row in results.rows if row.role == "grid"]
    splits = ["val", *(["test"] if all(row.test for row in rows) else [])]
    parts, seconds = [], 0.0
    for split in splits:
        evaluations = {
            row.name: rs.Evaluation.load(folder / "evaluations" / f"{row.name}.{split}.json")
            for row in rows
        }
        parts.append(HitTable.of(evaluations, [row.coefficients or () for row in rows]))
        seconds += statistics.median(item.record["seconds"] for item in evaluations.values())
    protocol = results.protocol
    record = {
        "data": results.data["name"],
        "model": results.model,
        "ingredients": list(rows[0].ingredients or ()),
        "attack": f"{protocol.attack}-{protocol.loss} at {', '.join(protocol.threats)}, "
        f"{protocol.steps} {protocol.step_word}, {protocol.restarts} restart(s)",
        "split": ", then ".join(splits),
        "seconds": {"attack": seconds},
    }
    return join_tables(parts, record)


def join_tables(parts: Sequence[HitTable], record: dict[str, Any]) -> HitTable:
    """Return one table of the same soups on the samples of all parts."""
    first = parts[0]
    hits = {key: np.concatenate([part.hits[key] for part in parts], 1) for key in first.hits}
    ids = np.concatenate([part.ids for part in parts])
    return HitTable(first.names, first.coefficients, ids, hits, record)


@dataclass(frozen=True)
class Maker:
    """Makes a small grid: trainings and attacks are short, since the map matters, not its height.

    Attributes:
        data: Name of the data set.
        model: Network.
        threats: Threat models of the ingredients.
        attacked: Threat model of the evaluation.
        train: Training samples; None for all.
        epochs: Epochs of the base; an ingredient takes half of them.
        samples: Samples of val and of test to evaluate on; None for all.
        steps: Steps of the attack.
        step: Step of the grid.
        seed: Seed of the split and of the trainings.
    """

    data: str
    model: str
    threats: tuple[str, ...]
    attacked: str
    train: int | None
    epochs: int
    samples: int | None
    steps: int
    step: float = 0.2
    seed: int = 0

    def make(self, folder: Path) -> HitTable:
        """Train the ingredients and evaluate the grid; a folder keeps what is finished."""
        data = rs.load_data(self.data, seed=self.seed)
        record = data.record
        network = rs.load_model(
            self.model,
            channels=record["channels"],
            mean=record["mean"],
            std=record["std"],
            seed=self.seed,
        )
        train = data.train.first(self.train)
        base = self._train(folder / "base", network, train, self.attacked, self.epochs)
        ingredients = [
            self._train(folder / f"{i}", base, train, threat, max(self.epochs // 2, 1))
            for i, threat in enumerate(self.threats)
        ]
        parts = [self._evaluate(folder, ingredients, split) for split in (data.val, data.test)]
        return self._join([table for table, _ in parts], [times for _, times in parts])

    def _train(
        self,
        stem: Path,
        start: nn.Module | rs.Checkpoint,
        train: Split,
        threat: str,
        epochs: int,
    ) -> rs.Checkpoint:
        path = stem.with_suffix(".safetensors")
        if not path.exists():
            lr = 0.1 if isinstance(start, nn.Module) else 0.02
            rs.train(
                start,
                train,
                threat=threat,
                epochs=epochs,
                attack_steps=1,
                lr=lr,
                seed=self.seed,
                state_path=stem.with_suffix(".state"),
            ).save(path)
        return rs.Checkpoint.load(path)

    def _evaluate(
        self, folder: Path, ingredients: list[rs.Checkpoint], split: Split
    ) -> tuple[HitTable, dict[str, float]]:
        """Return the verdicts on a split, and the mean seconds of an attack and a clean pass."""
        alphas = candidates("grid", len(ingredients), self.step)
        evaluations: dict[str, rs.Evaluation] = {}
        clean_seconds = []
        for alpha in alphas:
            path = folder / f"{split.name}-{alpha_name(alpha)}.json"
            if not path.exists():
                soup, count = rs.mix(ingredients, alpha), {"samples": self.samples}
                rs.evaluate(
                    soup, split, [self.attacked], steps=self.steps, precision="auto", **count
                ).save(path)
                clean_seconds.append(rs.evaluate(soup, split, **count).record["seconds"])
            evaluations[alpha_name(alpha)] = rs.Evaluation.load(path)
        attack_seconds = [item.record["seconds"] for item in evaluations.values()]
        times = {"attack": statistics.median(attack_seconds)}
        if clean_seconds:
            times["clean"] = statistics.median(clean_seconds)
        return HitTable.of(evaluations, alphas), times

    def _join(self, parts: list[HitTable], times: list[dict[str, float]]) -> HitTable:
        record: dict[str, Any] = {
            "data": self.data,
            "model": self.model,
            "ingredients": list(self.threats),
            "attack": f"apgd-ce at {self.attacked}, {self.steps} steps, 1 restart",
            "split": "val, then test",
        }
        if all("clean" in item for item in times):
            record["seconds"] = {
                key: sum(item[key] for item in times) for key in ("attack", "clean")
            }
        return join_tables(parts, record)


DIGITS = Maker(
    data="digits",
    model="resnet9:width=4",
    threats=("Linf 16/255", "Linf 64/255", "Linf 96/255", "L2 1"),
    attacked="Linf 56/255",
    train=None,
    epochs=8,
    samples=None,
    steps=10,
)
CIFAR = Maker(
    data="cifar10",
    model="resnet9:width=4",
    threats=("Linf 2/255", "Linf 4/255", "Linf 8/255", "L2 0.5"),
    attacked="Linf 4/255",
    train=5_000,
    epochs=8,
    samples=1_000,
    steps=10,
)
MAKERS = {"digits": DIGITS, "cifar10": CIFAR}
SMALL = replace(DIGITS, model="resnet9:width=2", threats=DIGITS.threats[:3], step=0.25, epochs=1)


def simulate_table(n: int, samples: int, seed: int) -> HitTable:
    """Return verdicts of a smooth map: a random polynomial of degree 2 in the coefficients.

    Each sample has a level of its own and slopes of its own, so neighbouring soups are right on
    nearly the same samples. Accuracies lie near 40 % under attack and 75 % without.
    """
    rng = np.random.default_rng([seed, n])
    alphas = np.array(candidates("grid", n, 0.2))
    i, j = np.triu_indices(n, 1)
    bends = alphas[:, i] * alphas[:, j]
    slope = alphas @ rng.normal(0, 0.35, n)
    robust = slope + bends @ rng.normal(0.3, 0.3, len(i)) - 0.4
    clean = 1.1 - slope + bends @ rng.normal(0.3, 0.2, len(i))
    own = rng.logistic(size=samples) + alphas @ rng.normal(0, 0.5, (n, samples))
    hits = {LINF_8: own < robust[:, None]}
    hits["clean"] = hits[LINF_8] | (own < clean[:, None])
    record = {"data": "simulated", "model": "polynomial of degree 2", "attack": f"seed {seed}"}
    return HitTable(tuple(map(alpha_name, alphas)), alphas, np.arange(samples), hits, record)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", type=Path, help="tables; docs/evidence/ by default")
    parser.add_argument("--pack", type=Path, help="run folder whose grid is packed into -o")
    parser.add_argument("--make", choices=MAKERS, help="make a grid on this data into -o")
    parser.add_argument(
        "--ingredients", type=int, choices=(3, 4), default=4, help="of --make, default 4"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --make, default 0")
    parser.add_argument("-o", "--output", type=Path, help="table to write")
    parser.add_argument("--halves", type=int, default=10, help="random halves, default 10")
    parser.add_argument("--simulate", action="store_true", help="replay simulated smooth maps")
    parser.add_argument("--small", action="store_true", help="run in seconds on digits")
    return parser.parse_args()


def main() -> None:
    """Pack, make or replay tables."""
    options = parse_options()
    if options.pack:
        print(pack_run(options.pack).save(options.output))
        return
    if options.make:
        maker = MAKERS[options.make]
        threats = maker.threats[: options.ingredients]
        maker = replace(maker, threats=threats, seed=options.seed)
        place = f"{options.make}-{options.ingredients}-{options.seed}"
        folder = cache_folder() / "benchmarks" / "surrogate" / place
        folder.mkdir(parents=True, exist_ok=True)
        print(maker.make(folder).save(options.output))
        return
    print(describe_machine())
    if options.small:
        with tempfile.TemporaryDirectory() as folder:
            small = replace(SMALL, steps=2, samples=64)
            replay(small.make(Path(folder)), "digits, small", halves=1)
        return
    if options.simulate:
        for n, seed in itertools.product((3, 4), range(3)):
            title = f"{n} ingredients, seed {seed}"
            replay(simulate_table(n, 4000, seed), title, options.halves, faces=False)
        return
    for path in options.tables or sorted(EVIDENCE.glob("*.npz")):
        replay(HitTable.load(path), path.stem, options.halves)


if __name__ == "__main__":
    main()
