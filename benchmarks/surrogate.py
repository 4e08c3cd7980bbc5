"""Regret against cost of ways to choose a soup, replayed from stored verdicts.

    python benchmarks/surrogate.py                                replay docs/evidence/*.npz
    python benchmarks/surrogate.py --small                        run, pack and replay a tiny recipe
    python benchmarks/surrogate.py --pack RUN_DIR -o TABLE.npz    pack the soups of a run folder
    python benchmarks/surrogate.py --simulate                     smooth maps with known verdicts

A table holds the verdicts of every soup of a grid on the same samples, so each way can be replayed
without a network. `surrogate` and `quadratic` attack what the engine requests, in soups' worth of
attacked samples; `spread` as many soups as the surrogate, spread evenly, without a model. `racing`
attacks the soups that meet the requirement in 16 rounds and drops those that have lost, with clean
verdicts in the place of a brief attack. `greedy` and `learned` are the soups of these methods in
the run, which were built on all samples; "surrogate, cost of greedy" attacks as many samples as the
greedy soup did.

Every way chooses on a random half of the samples; its regret is the robust accuracy of the full
grid's choice minus that of its own, on the same half and on the other one, over the goals that it
meets: the most robust soup, and the most robust one with clean accuracy above the quartiles of the
grid. Each face of a grid of four (one coefficient is 0) is a grid of its own. Seconds: mixing and a
clean pass of every soup, attacks of those that are attacked, learning, the model's work; clean
passes are timed when a run is packed.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe_machine, read_step_seconds, run_recipe_small
from numpy.typing import NDArray

import robustsoup as rs
from robustsoup.evaluation.hit_tables import Hits, HitTable
from robustsoup.evaluation.two_phase import estimate_accuracy, sample_order
from robustsoup.runs.results import Results
from robustsoup.soups.goal import Goal
from robustsoup.soups.grid import alpha_name, candidates
from robustsoup.soups.racing import Race
from robustsoup.soups.screening import EvaluationRequest
from robustsoup.soups.surrogate import Model, spread_rows
from robustsoup.soups.surrogate_search import SurrogateSearch, choose_part

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
    "greedy": "greedy",
    "cheap": "surrogate, cost of greedy",
    "learned": "learned",
}
TIMED_SOUPS = 5
"""Soups whose mixing and clean pass are timed when a run is packed."""


@dataclass(frozen=True)
class Case:
    """One choice: a grid, a half of its samples, and a requirement.

    Attributes:
        table: The verdicts of the grid.
        threat: The measure to maximise.
        half: (samples,) bool, the samples that choose.
        clean: Required clean accuracy; None for no requirement.
        seed: Seed of the engine.
        others: The verdicts of the greedy and the learned soups.
    """

    table: HitTable
    threat: str
    half: NDArray[np.bool_]
    clean: float | None
    seed: int
    others: HitTable

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

    def regret(self, hits: Hits, best: int) -> tuple[float, float]:
        """Return the regret of a choice in points, on the samples that choose and on the others.

        Args:
            hits: (samples,) verdicts of the choice under attack.
            best: Row of the full grid's choice.
        """
        lost = self.table.hits[self.threat][best].astype(float) - hits
        return 100 * float(lost[self.half].mean()), 100 * float(lost[~self.half].mean())

    def choose_other(self, prefix: str) -> Hits | None:
        """Return the verdicts of the most robust soup of a method that meets the requirement.

        Args:
            prefix: How the names of the soups begin. None is returned where none meets it.
        """
        clean, robust = (self.others.hits[key] for key in ("clean", self.threat))
        rows = [
            row
            for row, name in enumerate(self.others.names)
            if name.startswith(prefix) and clean[row, self.half].mean() >= (self.clean or 0)
        ]
        return max(
            (robust[row] for row in rows), key=lambda hits: hits[self.half].mean(), default=None
        )

    def run_engine(self, model: Model, most: float = math.inf) -> tuple[float, list[int], float]:
        """Run the engine; return what was attacked, which rows in full, and its seconds.

        Args:
            model: The model.
            most: Soups' worth of attacked samples after which the finalists are attacked as they
                stand, as under a time limit.
        """
        table, half = self.table, self.half
        clean = table.hits["clean"][:, half]
        ids = torch.from_numpy(table.ids[half])
        search = SurrogateSearch(
            table.names,
            tuple(tuple(map(float, row)) for row in table.coefficients),
            clean,
            Goal.parse(self.threat),
            choose_part(ids, rs.AttackSettings(seed=self.seed)),
            shortfall=tuple(max((self.clean or 0) - share, 0.0) for share in clean.mean(1)),
            seed=self.seed,
            model=model,
        )
        started = time.perf_counter()
        attacked: dict[str, Mapping[str, NDArray[np.bool_]]] = {}
        cost = 0.0
        while requests := search.next_requests(attacked):
            price = sum(price_request(item, len(ids)) for item in requests)
            if cost + price > most - 1 and attacked:
                requests = search.last_requests(attacked)[:1]
                if not requests or cost + price_request(requests[0], len(ids)) > most:
                    break
                price = price_request(requests[0], len(ids))
            cost += price
            for item in requests:
                hits = table.row(item.candidate)[self.threat][half]
                taken = search.part if item.subset else slice(None)
                attacked[item.candidate] = {self.threat: hits[taken]}
        rows = [
            table.names.index(name)
            for name, hits in attacked.items()
            if len(hits[self.threat]) == len(ids)
        ]
        return cost, rows, time.perf_counter() - started

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

        robust = full.sum(1).tolist()
        scores, running = {row: count(row) for row in rows}, list(rows)
        hits: dict[int, int] = {}
        while running:
            favourite = max(running, key=lambda row: scores[row].value)
            # The first runs all rounds; later ones one round, and are then tested.
            ends[favourite] = min(ends[favourite] + length, n) if hits else n
            scores[favourite] = count(favourite)
            tested = [favourite]
            if ends[favourite] == n:
                running.remove(favourite)
                leads = robust[favourite] > max(hits.values(), default=-1)
                hits[favourite] = robust[favourite]
                tested = running if leads else []
            race = Race(len(rows), max(hits.values()), 0.05)
            lost = {row for row in tested if race.has_lost(scores[row])}
            running = [row for row in running if row not in lost]
        return sum(ends.values()) / n, max(sorted(hits), key=lambda row: hits[row])

    def spread(self, count: int) -> list[int]:
        """Return `count` rows: the ingredients and soups spread evenly."""
        search = SurrogateSearch(
            self.table.names,
            tuple(tuple(map(float, row)) for row in self.table.coefficients),
            self.table.hits["clean"],
            Goal.parse(self.threat),
        )
        ends = list(search.ends)
        return [*ends, *spread_rows(search.places, ends, count - len(ends))]


def price_request(request: EvaluationRequest, samples: int) -> float:
    """Return the share of the samples that a request attacks, or adds to an attack on a part."""
    if request.after is not None and request.after.subset is not None:
        return 1 - request.after.subset / samples
    return 1.0 if request.subset is None else request.subset / samples


def list_faces(table: HitTable) -> Iterator[tuple[str, HitTable]]:
    """Yield the whole grid, and each face of three of four ingredients with its coefficients."""
    n = table.coefficients.shape[1]
    yield f"all {n}", table
    for face in itertools.combinations(range(n), 3) if n == 4 else ():
        others = [i for i in range(n) if i not in face]
        rows = [row for row, a in enumerate(table.coefficients) if not a[others].any()]
        part = table.take(rows)
        alphas = part.coefficients[:, list(face)]
        yield (
            "ingredients " + ", ".join(str(i + 1) for i in face),
            HitTable(part.names, alphas, part.ids, part.hits, part.record),
        )


def list_cases(table: HitTable, others: HitTable, threat: str, halves: int) -> Iterator[Case]:
    """Yield the cases of one grid."""
    samples = len(table.ids)
    for seed in range(halves):
        order = np.random.default_rng([seed, samples]).permutation(samples)
        half = np.zeros(samples, dtype=bool)
        half[order[: samples // 2]] = True
        clean = table.hits["clean"][:, half].mean(1)
        for quantile in QUANTILES:
            limit = None if quantile is None else float(np.quantile(clean, quantile))
            yield Case(table, threat, half, limit, seed, others)


@dataclass
class Tally:
    """What one way cost and lost over the cases of a grid.

    Attributes:
        attacked: Soups attacked in each case.
        seconds: Seconds of decisions in each case.
        same: Regret on the samples that chose, of the goals that were met.
        other: Regret on the other samples.
    """

    attacked: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    def add(self, attacked: float, regret: tuple[float, float] | None, seconds: float = 0) -> None:
        """Count one case; None stands for a goal that was not met."""
        self.attacked.append(attacked)
        self.seconds.append(seconds)
        if regret is not None:
            self.same.append(regret[0])
            self.other.append(regret[1])


def replay_case(case: Case, tallies: Mapping[str, Tally]) -> None:
    """Choose in every way, and count what it costs and loses."""
    n = case.table.coefficients.shape[1]
    robust = case.table.hits[case.threat]
    best = case.choose(list(range(len(case.table.names))))
    attacked = {way: case.run_engine(way) for way in WAYS}
    count = round(attacked["gaussian-process"][0])
    attacked["spread"] = (count, case.spread(count), 0.0)
    if case.others.names:
        attacked["cheap"] = case.run_engine("gaussian-process", 2 * n - 1)
        learned = sum(name.startswith("learned") for name in case.others.names)
        for way, count in (("greedy", 2 * n - 1), ("learned", learned)):
            hits = case.choose_other(way)
            regret = None if hits is None else case.regret(hits, best)
            tallies[way].add(count, regret)
    for way, (cost, rows, seconds) in attacked.items():
        tallies[way].add(cost, case.regret(robust[case.choose(rows)], best), seconds)
    cost, winner = case.run_race()
    tallies["racing"].add(cost, case.regret(robust[winner], best))


def describe_seconds(way: str, tally: Tally, table: HitTable) -> str:
    """Return the seconds of a way relative to the full grid, "-" if the table holds none."""
    costs, total = table.record.get("seconds", {}), len(table.names)
    if "clean" not in costs:
        return "-"
    attacked = statistics.mean(tally.attacked)
    passed = attacked if way in ("greedy", "learned") else total  # clean passes
    seconds = passed * costs["clean"] + attacked * costs["attack"] + statistics.mean(tally.seconds)
    seconds += costs["learned"] if way == "learned" else 0
    return f"{seconds / (total * (costs['clean'] + costs['attack'])):.2f}"


def replay_grid(title: str, table: HitTable, others: HitTable, threat: str, halves: int) -> None:
    """Replay all ways on one grid and print a row for each."""
    tallies = {way: Tally() for way in LABELS}
    cases = list(list_cases(table, others, threat, halves))
    for case in cases:
        replay_case(case, tallies)
    total = len(table.names)
    for way, tally in tallies.items():
        if not tally.attacked:
            continue
        mean, least, most = (
            statistics.mean(tally.attacked),
            min(tally.attacked),
            max(tally.attacked),
        )
        beyond = sum(regret > 0.5 for regret in tally.same)
        cells = [
            title,
            LABELS[way],
            f"{mean:.1f} of {total} ({mean / total:.0%}), {least:.0f} to {most:.0f}",
            describe_seconds(way, tally, table),
            f"{len(tally.same)} of {len(cases)}",
            describe(tally.same),
            f"{beyond / max(len(tally.same), 1):.0%}",
            describe(tally.other),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def describe(regrets: Sequence[float]) -> str:
    """Return the mean with its 95 % interval over the cases, and the largest."""
    if not regrets:
        return "-"
    half = 1.96 * statistics.stdev(regrets) / len(regrets) ** 0.5 if len(regrets) > 1 else 0.0
    return f"{statistics.mean(regrets):+.2f} ± {half:.2f}, at most {max(regrets):+.1f}"


def replay(table: HitTable, name: str, halves: int, *, faces: bool = True) -> None:
    """Print the table of one stored grid: one row for each face and way."""
    threats = [key for key in table.hits if key not in ("clean", "union")]
    record = table.record
    print(
        f"\n**{name}** ({record.get('data')}, {record.get('model')}; {len(table.ids):,} samples; "
        f"{record.get('attack')})\n\n"
        "| grid | way | soups attacked | seconds, grid = 1 | goals met | regret, same samples "
        "| above 0.5 | regret, other samples |\n|---|---|---|---|---|---|---|---|"
    )
    in_grid = ~np.isnan(table.coefficients).any(1)
    others = table.take(np.flatnonzero(~in_grid).tolist())
    table = table.take(np.flatnonzero(in_grid).tolist())
    grids = list(list_faces(table))[: None if faces else 1]
    for threat, (face, part) in itertools.product(threats, grids):
        title = face if len(threats) == 1 else f"{threat}, {face}"
        replay_grid(title, part, others if part is table else others.take([]), threat, halves)


def pack_run(folder: Path) -> HitTable:
    """Return the verdicts of the soups of a run folder: on val, and on test if all were reported.

    The coefficients of greedy and learned soups, which are not of the grid, are NaN.
    """
    results = Results.load(folder / "results.json")
    rows = [row for row in results.rows if row.role in ("grid", "greedy", "learned")]
    grid = [row for row in rows if row.role == "grid"]
    absent = (math.nan,) * len(grid[0].ingredients or ())
    coefficients = [(row.coefficients or absent) if row in grid else absent for row in rows]
    splits = ["val", *(["test"] if all(row.test for row in rows) else [])]
    parts, attack, seconds = [], 0.0, read_step_seconds()
    for split in splits:
        files = {row.name: f"evaluations/{row.name}.{split}.json" for row in rows}
        evaluations = {name: rs.Evaluation.load(folder / file) for name, file in files.items()}
        parts.append(HitTable.of(evaluations, coefficients))
        attack += statistics.median(seconds[results.files[files[row.name]].sha256] for row in grid)
    clean = time_clean(folder, results, [row.name for row in grid], splits)
    protocol = results.protocol
    record = {
        "data": results.data["name"],
        "model": results.model,
        "ingredients": list(grid[0].ingredients or ()),
        "attack": f"{protocol.attack}-{protocol.loss} at {', '.join(protocol.threats)}, "
        f"{protocol.steps} {protocol.step_word}, {protocol.restarts} restart(s)",
        "split": ", then ".join(splits),
        "seed": results.recipe["seed"],
        # An evaluation's seconds hold its clean pass.
        "seconds": {
            "clean": clean,
            "attack": max(attack - clean, 0.0),
            "learned": sum_learning_seconds(results, seconds),
        },
    }
    return join_tables(parts, record)


def time_clean(folder: Path, results: Results, names: list[str], splits: list[str]) -> float:
    """Return the median seconds of mixing a soup and of a clean pass over the splits' samples."""
    data = rs.load_data(results.data["name"], seed=results.data["seed"])
    first = next(row for row in results.rows if row.name == names[0])
    ingredients = [
        rs.Checkpoint.load(folder / "checkpoints" / f"{name}.safetensors")
        for name in first.ingredients or ()
    ]
    alpha = [1 / len(ingredients)] * len(ingredients)
    seconds = []
    for _ in range(TIMED_SOUPS):
        started = time.perf_counter()
        soup = rs.mix(ingredients, alpha)
        for split in splits:
            rs.evaluate(soup, getattr(data, split), samples=results.protocol.samples[split])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def sum_learning_seconds(results: Results, seconds: Mapping[str, float]) -> float:
    """Return the seconds in which the learned soups of a run were learned."""
    names = [row.coefficients_file for row in results.rows if row.role == "learned"]
    return sum(seconds[results.files[name].sha256] for name in names if name)


def join_tables(parts: Sequence[HitTable], record: dict[str, Any]) -> HitTable:
    """Return one table of the same soups on the samples of all parts."""
    first = parts[0]
    hits = {key: np.concatenate([part.hits[key] for part in parts], 1) for key in first.hits}
    ids = np.concatenate([part.ids for part in parts])
    return HitTable(first.names, first.coefficients, ids, hits, record)


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
    parser.add_argument("--pack", type=Path, help="run folder whose soups are packed into -o")
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
    print(describe_machine())
    if options.small:
        with tempfile.TemporaryDirectory() as folder:
            run = run_recipe_small("choosing_eps", Path(folder))
            replay(pack_run(run), "digits, small", halves=1)
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
