"""The masking check: what it flags, what it leaves alone, and that it changes no verdict."""

from dataclasses import replace

import pytest
import torch
from evaluated_networks import MirroredGradient, N, Wrapped, same_verdicts
from torch import nn

from robustsoup.data import load_data
from robustsoup.errors import RequestError
from robustsoup.evaluation.doubts import describe_masking
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.intervals import binomial_tail
from robustsoup.evaluation.masking import BUDGET_SHARE
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.settings import AttackSettings
from robustsoup.soups.screening import short_attack

LINF = "Linf 0.01"
STEPS = {"steps": 20}


def linear():
    """A linear network with random weights.

    The cross-entropy is convex in the image. So a step along the gradient raises the loss by at
    least what the gradient promises, and a small step against the gradient lowers it.
    """
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 10, bias=False)
    layer.weight = nn.Parameter(torch.randn(10, 64, generator=generator))
    return nn.Sequential(nn.Flatten(), layer)


def mask(name):
    """Return a network with the decisions of `linear` (up to rounding) that misleads an attack."""
    wrappers = {
        "reversed": {"before": lambda x: 2 * x.detach() - x},
        "shattered": {"before": lambda x: x + 1e-4 * torch.sin(1e7 * x)},
        "tiny logits": {"after": lambda z: 1e-8 * z},
        "one-hot": {"after": lambda z: 10.0 * nn.functional.one_hot(z.argmax(1), 10) + 1e-7 * z},
        "none": {"before": lambda x: x.detach()},
        "nan": {"before": lambda x: x + 0 * (x - x.detach()).sqrt()},
        "noise": {"before": NoisyGradient.apply},
        "huge logits": {"after": lambda z: 1e4 * z},
        "reversed at times": {"before": ReversedAtTimes.apply},
        "saturated": {"after": lambda z: 5 * torch.tanh(z)},
    }
    return Wrapped(linear(), **wrappers[name])


class NoisyGradient(torch.autograd.Function):
    """The identity, with noise of a hundred times the gradient's size in place of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
        return 100 * grad.abs().mean() * noise


class ReversedAtTimes(torch.autograd.Function):
    """The identity, whose gradient is reversed for about three images in ten."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward((x.flatten(1).sum(1) * 1000).round() % 10 < 3)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (reverse,) = ctx.saved_tensors
        return torch.where(reverse[:, None, None, None], -grad, grad)


MASKS = [
    "reversed",
    "shattered",
    "tiny logits",
    "one-hot",
    "none",
    "nan",
    "noise",
    "huge logits",
]


@pytest.fixture(scope="module")
def data():
    """Digits with the decisions of the linear network as labels."""
    split = load_data("digits").test.first(N)
    return replace(split, labels=evaluate(linear(), split).prediction)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("threat", [LINF, "L2 0.05", "L1 0.1"])
def test_masked_networks_are_flagged_and_keep_their_verdicts(data, name, threat):
    network = mask(name)
    checked = evaluate(network, data, [threat], **STEPS)
    unchecked = evaluate(network, data, [threat], masking_check=False, **STEPS)
    finding = checked.record["masking_check"][threat]["gradient"]
    assert finding["flagged"]
    assert any("the gradient misleads at" in warning for warning in checked.warnings)
    assert same_verdicts(checked, unchecked)
    assert "masking_check" not in unchecked.record


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("threat", [LINF, "L2 0.05", "L1 0.1"])
@pytest.mark.parametrize(
    "network",
    [
        linear(),
        Wrapped(linear(), after=lambda z: 0.1 * z),
        Wrapped(linear(), before=lambda x: x + ((2048 * x).round() / 2048 - x).detach()),
    ],
    ids=["linear", "temperature", "straight-through"],
)
def test_honest_networks_are_not_flagged(data, network, threat, loss):
    network.eval()
    labels = evaluate(network, data).prediction
    own = replace(data, labels=labels)
    checked = evaluate(network, own, [threat], loss=loss, **STEPS)
    assert checked.warnings == []
    assert checked.record["masking_check"][threat]["gradient"]["n"] >= 5
    unchecked = evaluate(network, own, [threat], loss=loss, masking_check=False, **STEPS)
    assert same_verdicts(checked, unchecked)


def test_a_gradient_that_misleads_at_a_part_of_the_samples_is_flagged(data):
    """Three in ten are far more than the promises that honest networks break."""
    checked = evaluate(mask("reversed at times"), data, ["Linf 0.001"], steps=60)
    finding = checked.record["masking_check"]["Linf 0.001"]["gradient"]
    assert 0.1 * finding["n"] < finding["hits"] < 0.5 * finding["n"]
    assert finding["flagged"]


@pytest.mark.parametrize("threat", [LINF, "L2 0.05"])
def test_a_gradient_of_other_pixels_is_flagged(data, threat):
    """The weights resemble their mirror image, so the gradient keeps a part of its promise."""
    network = linear().eval()
    weight = network[1].weight.data.view(10, 8, 8)
    network[1].weight.data = (weight + 0.25 * weight.flip(-1)).flatten(1)
    split = replace(data, labels=evaluate(network, data).prediction)
    assert evaluate(network, split, [threat], **STEPS).warnings == []
    mirrored = Wrapped(network, before=MirroredGradient.apply).eval()
    checked = evaluate(mirrored, split, [threat], **STEPS)
    assert checked.record["masking_check"][threat]["gradient"]["flagged"]


def hide_half(x):
    """Return the images, without a gradient in the left half."""
    return torch.cat([x[..., :4].detach(), x[..., 4:]], dim=-1)


@pytest.mark.parametrize("threat", [LINF, "L2 0.05"])
def test_pixels_whose_gradient_is_hidden_are_flagged(data, threat):
    checked = evaluate(Wrapped(linear(), before=hide_half), data, [threat], **STEPS)
    assert checked.record["masking_check"][threat]["gradient"]["flagged"]


class TwoBranches(nn.Module):
    """The sum of two linear networks, of which the logits of the second pass through `detach`."""

    def __init__(self, detach):
        super().__init__()
        self.first, self.second, self.detach = linear(), linear(), detach
        self.second[1].weight.data = self.second[1].weight.data.roll(1, 1)

    def forward(self, x):
        return (self.first(x) + self.detach(4 * self.second(x))) / 20


def detach_highest(logits):
    """Return logits without the gradient of the highest."""
    return torch.where(logits == logits.amax(1, keepdim=True), logits.detach(), logits)


@pytest.mark.parametrize("threat", [LINF, "L2 0.05"])
@pytest.mark.parametrize("detach", [torch.Tensor.detach, detach_highest])
def test_gradients_that_lack_a_part_are_flagged(data, threat, detach):
    """What is left of the gradient keeps its promise, but is not all of it."""
    for function, is_flagged in ((lambda z: z, False), (detach, True)):
        network = TwoBranches(function)
        split = replace(data, labels=evaluate(network, data).prediction)
        findings = evaluate(network, split, [threat], steps=40).record["masking_check"]
        assert findings[threat]["gradient"]["flagged"] == is_flagged


@pytest.mark.parametrize("threat", [LINF, "L2 0.05"])
def test_pixels_that_a_network_does_not_see_are_not_flagged(data, threat):
    cropped = Wrapped(linear(), before=lambda x: nn.functional.pad(x[..., 4:], (4, 0)))
    split = replace(data, labels=evaluate(cropped, data).prediction)
    checked = evaluate(cropped, split, [threat], **STEPS)
    assert checked.warnings == []
    assert checked.record["masking_check"][threat]["gradient"]["hits"] == 0


@pytest.mark.parametrize("attack", ["apgd", "square"])
def test_saturated_logits_are_flagged_where_the_attack_ends_in_a_tie(data, attack):
    """The gradient is right, but the two highest logits round to the same bound."""
    network = mask("saturated")
    split = replace(data, labels=evaluate(network, data).prediction)
    settings = {"attack": attack} | ({"n_queries": 50} if attack == "square" else STEPS)
    checked = evaluate(network, split, ["Linf 0.1"], **settings)
    finding = checked.record["masking_check"]["Linf 0.1"]["tied"]
    assert finding["flagged"]
    text = f"the two highest logits tie at {finding['hits']} of {finding['n']} survivors"
    assert any(text in warning for warning in checked.warnings)
    assert any("the logits saturate" in warning for warning in checked.warnings)
    unchecked = evaluate(network, split, ["Linf 0.1"], masking_check=False, **settings)
    assert same_verdicts(checked, unchecked)


def test_a_trained_network_is_not_flagged(model, data):
    own = replace(data, labels=evaluate(model, data).prediction)
    for threat in ("Linf 0.02", "L2 0.2"):
        assert evaluate(model, own, [threat], **STEPS).warnings == []


class ThresholdRow(nn.Module):
    """The first class, unless a pixel of the first row lies above 0.5; without a gradient."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        raised = (x.detach()[:, 0, 0] > 0.5).any(1).float()
        return torch.stack([1 - raised, raised, *[-torch.ones_like(raised)] * 8], 1)


def test_square_breaks_what_a_search_without_a_gradient_does_not(data):
    """APGD starts at random and stays there; Square raises a pixel of the first row."""
    grey = torch.full_like(data.images, 127)
    grey[:, :, 0, 1:] = 0  # one pixel decides, so that half of the random starts fail
    split = replace(data, images=grey, labels=torch.zeros_like(data.labels))
    evaluation = evaluate(ThresholdRow(), split, ["Linf 0.01"], steps=100)
    finding = evaluation.record["masking_check"]["Linf 0.01"]["square"]
    assert finding["flagged"]
    assert finding["hits"] <= finding["n"] <= evaluation.accuracy["Linf 0.01"].hits
    text = f"Square further breaks {finding['hits']} of {finding['n']} survivors ["
    assert any(text in warning for warning in evaluation.warnings)


def test_the_hint_names_a_loss_only_if_it_helps(data):
    def hint(name, loss):
        (warning,) = [
            text
            for text in evaluate(mask(name), data, [LINF], loss=loss, **STEPS).warnings
            if "the gradient misleads" in text
        ]
        return warning

    assert "try loss dlr" in hint("tiny logits", "ce")
    for loss in ("ce", "dlr"):
        assert "loss dlr" not in hint("reversed", loss)
        assert "try attack square" in hint("reversed", loss)
    for loss in ("ce", "dlr"):
        warnings = evaluate(mask("none"), data, [LINF], loss=loss, **STEPS).warnings
        assert "loss dlr" not in " ".join(warnings)


def test_the_check_stays_within_its_budget(data):
    for steps in (1, 3, 10, 40):
        evaluation = evaluate(linear(), data, [LINF], steps=steps)
        by, step = evaluation.threats[LINF].by, evaluation.threats[LINF].step
        passes = 2 * int(torch.where(by == -1, steps, step).sum())
        findings = evaluation.record["masking_check"][LINF]
        assert findings["budget"] == int(BUDGET_SHARE * passes)
        spent = sum(item["passes"] for item in findings.values() if isinstance(item, dict))
        assert spent <= findings["budget"]


def test_findings_depend_on_the_seed_and_the_ids_alone(data):
    network = mask("shattered")
    threads = torch.get_num_threads()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = replace(
        data, images=data.images[order], labels=data.labels[order], ids=data.ids[order]
    )

    def findings(split, **settings):
        evaluation = evaluate(network, split, [LINF, "L2 0.05"], **STEPS, **settings)
        return evaluation.record["masking_check"]

    expected = findings(data)
    assert findings(data) == expected
    assert findings(shuffled) == expected
    assert findings(data, batch_size=500) == expected
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            assert findings(data) == expected
    finally:
        torch.set_num_threads(threads)


def test_points_of_other_networks_are_tried_and_change_no_verdict(data):
    """A network without a gradient makes the decisions of `linear`, so its points break it."""
    threat = "Linf 0.05"
    other = evaluate(linear(), data, [threat], keep_points=True, **STEPS)
    masked = evaluate(mask("none"), data, [threat], **STEPS)
    checked = evaluate(mask("none"), data, [threat], others=[other], **STEPS)
    assert same_verdicts(checked, masked)
    finding = checked.record["masking_check"][threat]["transfer"]
    assert finding["hits"] > 0
    assert (
        f"further break {finding['hits']} of {finding['n']}" in describe_masking(checked.record)[0]
    )
    without_points = evaluate(linear(), data, [threat], **STEPS)
    with pytest.raises(RequestError, match="pool, others: an evaluation kept no points"):
        evaluate(mask("none"), data, [threat], others=[without_points])


def test_findings_come_back_from_their_file_and_after_an_identical_attack(data, tmp_path):
    evaluation = evaluate(mask("reversed"), data, [LINF], **STEPS)
    loaded = Evaluation.load(evaluation.save(tmp_path / "eval.json"))
    assert loaded.record["masking_check"] == evaluation.record["masking_check"]
    again = evaluate(mask("reversed"), data, [LINF], after=evaluation, **STEPS)
    assert again.record["masking_check"] == evaluation.record["masking_check"]
    assert again.warnings == evaluation.warnings


def test_square_attacks_as_an_evaluation_and_needs_no_check_of_gradients(data):
    settings = {"attack": "square", "n_queries": 30, "restarts": 2}
    honest = evaluate(linear(), data, ["Linf 0.05"], **settings)
    masked = evaluate(mask("reversed"), data, ["Linf 0.05"], **settings)
    assert same_verdicts(honest, masked)
    assert masked.warnings == []
    record = honest.record
    assert record["broken_by"] == ["clean", "square", "square restart 2"]
    assert (record["loss"], record["n_queries"]) == ("margin", 30)
    assert set(record["masking_check"]["Linf 0.05"]) == {"survivors", "budget", "tied"}
    certificate = record["certificate"]["Linf 0.05"]
    assert certificate["points"] == N
    assert certificate["outside"] == 0


def test_screening_leaves_the_check_to_the_evaluations_that_follow():
    assert AttackSettings().masking_check
    assert not short_attack(AttackSettings(), 10).masking_check


def test_the_tail_of_the_binomial_distribution():
    assert binomial_tail(0, 7, 0.3) == pytest.approx(1)
    assert binomial_tail(2, 2, 0.25) == pytest.approx(1 / 16)
    assert binomial_tail(1, 3, 0.5) == pytest.approx(7 / 8)
    tails = [binomial_tail(hits, 20, 0.2) for hits in range(21)]
    assert tails == sorted(tails, reverse=True)


def test_what_reads_clean_logits_says_the_same_after_another_evaluation(data):
    network = Wrapped(linear(), before=ReversedAtTimes.apply, after=lambda z: 20 * z)
    settings = {"attack": "strong", "steps": 3, "n_queries": 300, "targets": 2}
    settings["masking_check"] = False
    clean = evaluate(network, data)
    alone = evaluate(network, data, ["Linf 0.02"], **settings)
    assert same_verdicts(evaluate(network, data, ["Linf 0.02"], after=clean, **settings), alone)


def test_the_masking_check_says_the_same_after_another_evaluation(data):
    network = mask("tiny logits")
    alone = evaluate(network, data, [LINF], **STEPS)
    after = evaluate(network, data, [LINF], after=evaluate(network, data), **STEPS)
    assert after.record["masking_check"] == alone.record["masking_check"]
