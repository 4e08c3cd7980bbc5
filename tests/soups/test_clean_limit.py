"""Learning subject to a limit on the clean loss: its multiplier, and what it changes."""

import pytest
import torch
from learning_helpers import (
    NetworkWithoutNorm,
    learn_digits,
    resnet_ingredients,
    small_ingredients,
)

from robustsoup.attacks.losses import ce
from robustsoup.errors import RequestError
from robustsoup.settings import LearnSettings
from robustsoup.soups import clean_limit
from robustsoup.soups.clean_limit import RATE, CleanLimit
from robustsoup.training.objectives import mixed
from robustsoup.training.sharing import BatchShare

Y = torch.tensor([0, 1, 2, 3])


def logits(seed):
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_multiplier_follows_the_clean_loss():
    limit, expected = CleanLimit(2.0), 0.0
    for scale in (5.0, 4.0, 0.0, 0.0, 0.0):
        clean = scale * logits(0)
        limit.begin_step().loss(clean, logits(1), Y)
        limit.end_step([BatchShare(0, 4, 4)])
        expected = max(0.0, expected + RATE * (float(ce(clean, Y).mean()) - 2.0))
        assert limit.multiplier == pytest.approx(expected, abs=1e-12)
    assert expected > 0  # ln 10 > 2: uniform logits miss the limit


def test_a_limit_that_is_kept_never_gives_a_negative_multiplier():
    limit = CleanLimit(1e9)
    limit.begin_step().loss(logits(0), logits(1), Y)
    limit.end_step([BatchShare(0, 4, 4)])
    assert limit.multiplier == 0


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 3.0])
def test_the_loss_is_the_mixture_that_the_multiplier_gives(multiplier):
    limit = CleanLimit(1.0)
    limit.multiplier = multiplier
    loss = limit.begin_step().loss(logits(0), logits(1), Y)
    if multiplier:
        weight = multiplier / (1 + multiplier)
        assert torch.equal(loss, mixed(weight).loss(logits(0), logits(1), Y))
    robust, clean = ce(logits(1), Y).mean(), ce(logits(0), Y).mean()
    assert float(loss) == pytest.approx(float(robust + multiplier * clean) / (1 + multiplier))


def test_parts_of_a_batch_count_by_their_size():
    limit = CleanLimit(0.5)
    objective, parts = limit.begin_step(), BatchShare(0, 4, 4).split(2)
    for part in parts:
        objective.loss(part.take(logits(0)), part.take(logits(1)), part.take(Y))
    limit.end_step(parts)
    assert limit.loss_sum == pytest.approx(float(ce(logits(0), Y).mean()))


def test_a_fixed_multiplier_learns_what_its_mixture_learns(monkeypatch):
    monkeypatch.setattr(clean_limit, "RATE", 0.0)
    original = CleanLimit.__init__

    def start_at_one(self, most):
        original(self, most)
        self.multiplier = 1.0

    monkeypatch.setattr(CleanLimit, "__init__", start_at_one)
    items = resnet_ingredients()
    limited = learn_digits(items, clean_limit=1.0)
    assert torch.equal(limited.alpha, learn_digits(items, objective="mixed 0.5").alpha)


def test_the_history_tells_the_clean_loss_and_the_multiplier():
    net, items = small_ingredients(kind=NetworkWithoutNorm)
    learned = learn_digits(items, network=net, clean_limit=1e-3, epochs=1)
    (entry,) = learned.record["history"]
    steps = round(entry["multiplier"] / (RATE * (entry["clean_loss"] - 1e-3)))
    assert steps >= 1
    assert entry["multiplier"] == pytest.approx(RATE * steps * (entry["clean_loss"] - 1e-3))
    (warning,) = learned.record["warnings"]
    assert "above the limit of 0.001; learn for more epochs" in warning
    record = learn_digits(items, network=net, clean_limit=1e9, epochs=1).record
    assert record["history"][0]["multiplier"] == 0
    assert "warnings" not in record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dial": {}}, "clean_limit: does not apply to a dial"),
        ({"objective": "mixed 0.5"}, "clean_limit: got the objective mixed 0.5"),
        ({"early_stop": {}}, "clean_limit: no single figure tells the best epoch"),
        ({"threat": "clean"}, "clean_limit: requires a threat"),
        ({"clean_limit": 0.0}, "clean_limit: got 0.0"),
    ],
)
def test_settings_that_do_not_apply_are_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        LearnSettings(**{"clean_limit": 1.0, **changes})
