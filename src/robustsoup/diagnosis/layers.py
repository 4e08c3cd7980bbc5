"""Which blocks carry robustness: swap each block between two checkpoints and measure the cost."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.data import SplitLike, as_split
from robustsoup.diagnosis.barriers import measure_losses
from robustsoup.diagnosis.check import build_model
from robustsoup.display import html_table
from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.gradients import gradients_enabled
from robustsoup.progress import Progress
from robustsoup.soups.granularity import layer_groups
from robustsoup.soups.merging import merge
from robustsoup.soups.mixing import open_ingredients
from robustsoup.threats import CLEAN, ThreatModel

Accuracies = dict[str, Accuracy]
"""Threat as text, or "clean" -> accuracy with its interval."""


@dataclass(frozen=True)
class BlockSwap:
    """What it costs to swap one block.

    Attributes:
        block: Name of the block; "*" for the whole network.
        parameters: Names of its parameters.
        numbers: How many numbers they hold.
        into_first: Accuracies of the first checkpoint with the block of the second.
        into_second: Accuracies of the second checkpoint with the block of the first.
    """

    block: str
    parameters: tuple[str, ...]
    numbers: int
    into_first: Accuracies
    into_second: Accuracies


@dataclass(frozen=True, repr=False)
class LayerMap:
    """What each block is worth to two checkpoints.

    Attributes:
        names: Names of the two checkpoints.
        samples: Number of samples that were measured.
        first: Accuracies of the first checkpoint.
        second: Accuracies of the second checkpoint.
        swaps: One swap for each block, in the order of the network.
    """

    names: tuple[str, str]
    samples: int
    first: Accuracies
    second: Accuracies
    swaps: tuple[BlockSwap, ...]

    def __repr__(self) -> str:
        """Return one line: the dearest block of the first checkpoint."""
        measure = list(self.first)[-1]
        changes = {swap.block: self.change(swap, measure)[0] for swap in self.swaps}
        dearest = min(changes, key=lambda block: changes[block])
        return (
            f"LayerMap({len(self.swaps)} blocks, {measure}: swapping {dearest} changes the first "
            f"checkpoint by {100 * changes[dearest]:+.1f} points)"
        )

    def _repr_html_(self) -> str:
        return html_table("What a swapped block changes, in points", self.columns(), self.rows())

    def change(self, swap: BlockSwap, measure: str) -> tuple[float, float]:
        """Return how much a swap changes the accuracy of the first and the second checkpoint."""
        return (
            swap.into_first[measure].value - self.first[measure].value,
            swap.into_second[measure].value - self.second[measure].value,
        )

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        return ("block", "numbers", *(f"{end}, {m}" for m in self.first for end in ("1st", "2nd")))

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table: the change of each accuracy in points."""
        return [
            (
                swap.block,
                f"{swap.numbers:,}",
                *(f"{100 * value:+.1f}" for m in self.first for value in self.change(swap, m)),
            )
            for swap in self.swaps
        ]

    def to_json(self) -> dict[str, Any]:
        """Convert the map for json.dumps, with the change of each accuracy in [-1, 1]."""
        swaps = [
            {
                "block": swap.block,
                "parameters": list(swap.parameters),
                "numbers": swap.numbers,
                "into_first": _to_json(swap.into_first),
                "into_second": _to_json(swap.into_second),
                "change": {measure: list(self.change(swap, measure)) for measure in self.first},
            }
            for swap in self.swaps
        ]
        return {
            "names": list(self.names),
            "samples": self.samples,
            "first": _to_json(self.first),
            "second": _to_json(self.second),
            "swaps": swaps,
        }


@gradients_enabled()
def map_layers(
    first: CheckpointLike,
    second: CheckpointLike,
    data: SplitLike,
    *,
    threat: ThreatModel | str = CLEAN,
    granularity: str = "block",
    samples: int = 256,
    network: nn.Module | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> LayerMap:
    """Swap each block between two checkpoints and measure what it costs.

    A block comes with its BatchNorm statistics. Accuracy is measured on clean inputs and, with a
    threat, under APGD of 10 steps in its training form; differences between blocks, not the level,
    are what the map shows. `merge(..., "swap", blocks=...)` makes the networks that it measures.

    Args:
        first: A checkpoint or path.
        second: Another checkpoint of the same network.
        data: Samples to measure on. Nothing is selected on them, so any split is allowed.
        threat: Threat to evaluate under, besides clean inputs.
        granularity: What is swapped together: parameter, module, block or re:PATTERN.
        samples: Evaluate on the first `samples` samples (all, if there are fewer).
        network: The network, if the files do not record theirs; it is not changed.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        on_progress: Receives the number of evaluated networks and their total.

    Raises:
        IngredientMismatch: The checkpoints are of different networks.
        ModelError: The network does not fit the data.
        RequestError: The granularity is unknown, or fewer than 1 sample.

    Source: Zhu et al. 2023, arXiv:2308.02533, section 3 (which measures the loss in the worst
        direction of a module's weights instead).
    """
    if samples < 1:
        raise RequestError(f"check: got samples {samples}, expected at least 1")
    threat, data = ThreatModel.parse(threat), as_split(data, "check")
    pair = open_ingredients([first, second], network)
    subset = data.first(min(samples, len(data)))
    model = build_model(pair[0], network, subset, threat, device)
    groups = layer_groups(model, granularity)
    subset = subset.to(next(model.parameters()).device)
    threats = list(dict.fromkeys((CLEAN, threat)))
    n, total, done = len(subset), 2 * len(groups) + 2, 0

    def evaluate_next(soup: Checkpoint) -> Accuracies:
        nonlocal done
        soup.load_into(model)
        measured = measure_losses(model, subset, threats)
        done += 1
        if on_progress:
            on_progress(done, total, "")
        return {
            str(item): Accuracy(round(share * n), n)
            for item, (_, share) in zip(threats, measured, strict=True)
        }

    ends = [evaluate_next(item) for item in pair]
    swaps = []
    for block, names in groups.items():
        into_first, into_second = (
            evaluate_next(
                merge(items, "swap", [0, 1], blocks=tuple(names), network=network, device="cpu")
            )
            for items in (pair, pair[::-1])
        )
        numbers = sum(pair[0].tensors[name].numel() for name in names)
        swaps.append(BlockSwap(block, tuple(names), numbers, into_first, into_second))
    return LayerMap((pair[0].name, pair[1].name), n, ends[0], ends[1], tuple(swaps))


def _to_json(accuracies: Accuracies) -> dict[str, Any]:
    return {measure: accuracy.to_json() for measure, accuracy in accuracies.items()}
