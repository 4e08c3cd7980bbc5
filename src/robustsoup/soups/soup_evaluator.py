"""Mix, merge and evaluate the soups of a search."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from robustsoup.attacks.adaptation import copy_network
from robustsoup.catalog import SOUP_METHODS
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.data import Split
from robustsoup.data.corruptions import CorruptionPart
from robustsoup.errors import RequestError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.masking import MOST_POINT_BYTES
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.settings import (
    AttackSettings,
    LearnSettings,
    MergeSettings,
    SearchSettings,
    make_settings,
)
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.explanation import describe_soup
from robustsoup.soups.grid import Alpha, corners
from robustsoup.soups.merging import check_numbers, merge
from robustsoup.soups.method_keys import is_merge
from robustsoup.soups.mixing import mix
from robustsoup.soups.screening import (
    EvaluationRequest,
    EvaluationsByRequest,
    mark_screened,
    short_attack,
)
from robustsoup.soups.selection import Candidate
from robustsoup.threats import ThreatModel, parse_threats


def name_ingredients(ingredients: Sequence[Checkpoint]) -> list[str]:
    """Return a short unique name for each ingredient: its file's stem, else a number."""
    names: list[str] = []
    for number, item in enumerate(ingredients, 1):
        name = item.path.stem if item.path else f"ingredient {number}"
        names.append(f"{name} ({number})" if name in names else name)
    return names


@dataclass(frozen=True)
class Merging:
    """How a search merges: the method, its numbers and the base."""

    method: str
    settings: MergeSettings
    base: CheckpointLike | None


def describe_merging(
    settings: SearchSettings,
    changes: Mapping[str, Any],
    base: CheckpointLike | None,
) -> Merging | None:
    """Return how the method merges; None for a method that lists or learns coefficients.

    Raises:
        RequestError: A number or a base is given that the method does not read.
    """
    method = settings.method
    if not isinstance(method, str) or not is_merge(method):
        if given := [*changes, *(["base"] if base is not None else [])]:
            raise RequestError(f'search: {given[0]}: has no meaning with method "{method}"')
        return None
    merging = make_settings(MergeSettings, None, changes)
    check_numbers(SOUP_METHODS.get_entry(method), changes)
    return Merging(method, merging, base)


@dataclass(frozen=True)
class SoupEvaluator:
    """Mixes and evaluates soups; the attributes are the arguments of `search`.

    `measure_under` is the threat of statistics and merges that are measured under attack. It does
    not depend on the threats that an evaluation attacks with, so a soup is the same in all of them.
    """

    ingredients: tuple[Checkpoint, ...]
    data: Split
    threats: tuple[ThreatModel | str, ...]
    measure_under: ThreatModel
    attack: AttackSettings
    buffers: str | None
    calibrate_on: Split | None
    network: nn.Module | None
    device: str
    shift: str | os.PathLike[str] | None
    shift_part: CorruptionPart = "select"
    merging: Merging | None = None
    learn: LearnSettings = field(default_factory=LearnSettings)
    allow_leakage: bool = False

    def mix_network(self, alpha: Alpha | Coefficients) -> nn.Module:
        """Return the network with the weights of a soup."""
        soup = self.make_soup(alpha)
        model = soup.network() if self.network is None else copy_network(self.network)
        soup.load_into(model)
        return model

    @property
    def training_data(self) -> Split:
        """The split that soups are learned on; `search` has checked that there is one."""
        if self.calibrate_on is None:
            raise RequestError("search: requires training samples; give calibrate_on")
        return self.calibrate_on

    @property
    def names(self) -> list[str]:
        """Names of the ingredients."""
        return name_ingredients(self.ingredients)

    @property
    def averages(self) -> bool:
        """Whether a one-hot soup equals its ingredient bit for bit."""
        return self.buffers in (None, "average") and self.merging is None

    @property
    def unmixed(self) -> "SoupEvaluator":
        """The evaluator whose one-hot soups are the ingredients themselves."""
        return replace(self, buffers="average", merging=None)

    def describe(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its description in words."""
        equals = self.averages and 1.0 in candidate.alpha
        ingredient = self.names[candidate.alpha.index(1.0)] if equals else None
        merged_by = None if self.merging is None else self.merging.method
        description = describe_soup(
            candidate.alpha, self.names, ingredient=ingredient, merged_by=merged_by
        )
        return replace(candidate, description=description, ingredient=ingredient)

    def evaluate_ingredients(
        self, known: Mapping[str, Evaluation] = MappingProxyType({}), *, keep_points: bool = False
    ) -> dict[str, Evaluation]:
        """Return the evaluation of each ingredient by name; `known` are not made again."""
        unmixed = self.unmixed
        alphas = zip(self.names, corners(len(self.ingredients)), strict=True)
        return {
            name: known[name] if name in known else unmixed.evaluate(alpha, keep_points=keep_points)
            for name, alpha in alphas
        }

    def make_soup(self, alpha: Alpha | Coefficients) -> Checkpoint:
        """Mix or merge a soup."""
        merging = self.merging
        if merging is None or isinstance(alpha, Coefficients):
            return mix(
                self.ingredients,
                alpha,
                buffers=self.buffers,
                calibrate_on=self.calibrate_on,
                threat=self.measure_under,
                network=self.network,
                device=self.device,
                seed=self.attack.seed,
            )
        return merge(
            self.ingredients,
            merging.method,
            alpha,
            merging.settings,
            base=merging.base,
            data=self.calibrate_on,
            threat=self.measure_under,
            buffers=self.buffers or "average",
            allow_leakage=self.allow_leakage,
            network=self.network,
            device=self.device,
            seed=self.attack.seed,
        )

    def evaluate(
        self,
        alpha: Alpha | Coefficients,
        *,
        keep_points: bool = False,
        others: Sequence[Evaluation] = (),
        pool: Sequence[Evaluation] = (),
        after: Evaluation | None = None,
        subset: int | None = None,
    ) -> Evaluation:
        """Evaluate a soup, on a part of the samples if `subset` says so; see `evaluate`."""
        return evaluate(
            self.mix_network(alpha),
            self.data,
            self.threats,
            self.attack,
            device=self.device,
            keep_points=keep_points,
            others=others,
            pool=pool,
            after=after,
            subset=subset,
            shift=self.shift,
            shift_part=self.shift_part,
        )

    def evaluate_clean(self, alpha: Alpha) -> Evaluation:
        """Evaluate a soup without an attack."""
        return evaluate(self.mix_network(alpha), self.data, device=self.device)

    @property
    def tries_points_of_others(self) -> bool:
        """Whether the masking check of a soup tries the points of the ingredients."""
        attacked = sum(not threat.is_clean for threat in parse_threats(self.threats))
        size = attacked * self.data.images.numel() * torch.float32.itemsize
        return self.attack.masking_check and 0 < size <= MOST_POINT_BYTES

    def evaluate_request(
        self,
        alpha: Alpha,
        request: EvaluationRequest,
        results: EvaluationsByRequest,
        screen_steps: int,
    ) -> Evaluation:
        """Evaluate a soup with the attack that a screening requests."""
        short = request.mode == "short"
        attack = short_attack(self.attack, screen_steps) if short else self.attack
        evaluation = replace(self, attack=attack).evaluate(
            alpha,
            keep_points=request.keep_points,
            pool=[results[item] for item in request.pool],
            after=None if request.after is None else results[request.after],
            subset=request.subset,
        )
        return mark_screened(evaluation) if short else evaluation
