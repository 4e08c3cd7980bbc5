"""MALT's ranking, the margin losses, and the attacks pma, malt and strong."""

import pytest
import torch
from digits import check_inside, digits_network
from torch import nn

from robustsoup.attacks.attempts import list_attempts
from robustsoup.attacks.losses import margin, probability_margin, targeted_margin
from robustsoup.attacks.malt import rank_targets
from robustsoup.catalog import LOSSES
from robustsoup.data import Split, load_data, to_float
from robustsoup.errors import RequestError
from robustsoup.evaluation.attack_texts import describe_attack
from robustsoup.evaluation.attackers import QueueAttacker
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel

DUAL = {"Linf": 1, "L2": 2, "L1": torch.inf}


def linear_network(classes, pixels=16):
    generator = torch.Generator().manual_seed(classes)
    network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(classes, pixels, generator=generator))
        network[1].bias.copy_(torch.randn(classes, generator=generator))
    return network.requires_grad_(False)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_ranking_is_exact_for_a_linear_network(norm):
    network = linear_network(6)
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    logits, weight = network(x), network[1].weight
    y = logits.argmax(1)
    ranking = rank_targets(network, x, y, norm)
    for row in range(len(x)):
        others = [c for c in range(6) if c != y[row]]
        # The distance to a half-space: its margin over the dual norm of its normal.
        distance = {
            c: float(logits[row, y[row]] - logits[row, c])
            / float(torch.linalg.vector_norm(weight[y[row]] - weight[c], DUAL[norm]))
            for c in others
        }
        assert ranking[row].tolist() == sorted(others, key=distance.__getitem__)


def test_the_ranking_equals_a_jacobian_on_a_trained_network():
    network = digits_network(4)
    split = load_data("digits").test.first(12)
    x = to_float(split.images)
    y = network(x).argmax(1)
    ranking = rank_targets(network, x, y, "Linf")
    for row in range(len(x)):
        image = x[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(network, image)[0, :, 0].flatten(1)
        logits = network(image)[0]
        gap = logits[y[row]] - logits
        scores = gap / (jacobian[y[row]] - jacobian).abs().sum(1)
        scores[y[row]] = torch.inf
        ranked = scores[ranking[row]]
        assert bool((ranked[1:] >= ranked[:-1] * (1 - 1e-3)).all())
        assert sorted([*ranking[row].tolist(), int(y[row])]) == list(range(10))


def test_classes_without_a_gradient_follow_the_logits():
    class Rounded(nn.Module):
        def forward(self, x):
            return (4 * x).round().flatten(1)[:, :4]

    x = torch.tensor([0.9, 0.1, 0.7, 0.4]).view(1, 1, 2, 2)
    assert rank_targets(Rounded(), x, torch.tensor([0]), "Linf").tolist() == [[2, 3, 1]]


def test_margins_are_above_0_where_misclassified():
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 2.0, -1.0]])
    y, target = torch.tensor([0, 0]), torch.tensor([1, 2])
    assert margin(logits, y).tolist() == [-0.5, 2.0]
    assert targeted_margin(logits, y, target).tolist() == [-2.0, -1.0]
    p = logits.softmax(1)
    expected = torch.stack([p[0, 2] - p[0, 0], p[1, 1] - p[1, 0]])
    assert torch.allclose(probability_margin(logits, y), expected)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("loss", ["margin", "targeted margin", "probability margin"])
def test_margin_losses_have_a_gradient_with_few_classes(loss, classes):
    logits = torch.randn(5, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.zeros(5, dtype=torch.long)
    target = [y + 1] if LOSSES[loss].facts.get("targeted") else []
    (grad,) = torch.autograd.grad(LOSSES[loss].load()(logits, y, *target).sum(), logits)
    assert bool((grad.abs().amax(1) > 0).all())
    assert bool((grad[:, 0] < 0).all())


def few_classes(classes):
    """A linear network, and images whose labels are its predictions."""
    network = linear_network(classes, pixels=64)
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    return network, Split.from_tensors(images, network(to_float(images)).argmax(1))


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("attack", ["malt", "strong"])
def test_they_are_exact_for_linear_networks_of_any_number_of_classes(attack, classes):
    network, split = few_classes(classes)
    x, y, weight = to_float(split.images), split.labels, network[1].weight
    logits, rows = network(x), torch.arange(len(x))
    size = (weight[y][:, None] - weight[None]).abs().sum(2)
    distance = (logits[rows, y][:, None] - logits) / size
    eps = round(float(distance.masked_fill(size == 0, torch.inf).amin(1).median()), 4)
    lower, upper = (x - eps).clamp(min=0).flatten(1), (x + eps).clamp(max=1).flatten(1)
    # The largest margin of each other class over the ball and the box.
    difference = weight[None] - weight[y][:, None]
    points = torch.where(difference > 0, upper[:, None], lower[:, None])
    bias = network[1].bias
    best = (difference * points).sum(2) + bias[None] - bias[y][:, None]
    best[rows, y] = -torch.inf
    clear = best.amax(1).abs() > 1e-3
    evaluation = evaluate(
        network, split, [f"Linf {eps}"], attack=attack, steps=30, n_queries=5, masking_check=False
    )
    robust = evaluation.threats[f"Linf {eps}"].robust
    assert 0 < int((best.amax(1) > 0).sum()) < len(x)
    assert torch.equal(robust[clear], (best.amax(1) <= 0)[clear])
    assert bool((logits.argmax(1) == y).all())


def test_strong_names_its_parts_and_its_points_are_inside():
    network, split = digits_network(4), load_data("digits").test.first(40)
    settings = {"attack": "strong", "steps": 4, "n_queries": 6, "targets": 2, "restarts": 2}
    evaluation = evaluate(network, split, ["Linf 24/255"], keep_points=True, **settings)
    record = evaluation.record
    assert record["broken_by"][:4] == ["clean", "pma", "pma restart 2", "malt target 1"]
    assert record["broken_by"][-2:] == ["square", "square restart 2"]
    assert (record["targets"], record["n_queries"], record["trial_queries"]) == (2, 6, 6)
    verdicts = evaluation.threats["Linf 24/255"]
    check_inside(verdicts.x_adv, to_float(split.images), ThreatModel.parse("Linf 24/255"))
    with torch.no_grad():
        fooled = network(verdicts.x_adv).argmax(1) != split.labels
    assert torch.equal(verdicts.robust, ~fooled)


def test_verdicts_do_not_depend_on_the_samples_beside():
    network, split = digits_network(4), load_data("digits").test
    settings = {"attack": "strong", "steps": 4, "n_queries": 6, "masking_check": False}
    whole = evaluate(network, split.first(40), ["Linf 24/255"], **settings)
    part = evaluate(network, split.first(9), ["Linf 24/255"], **settings)
    for name in ("robust", "by", "step"):
        both = (getattr(e.threats["Linf 24/255"], name)[:9] for e in (whole, part))
        assert torch.equal(*both)


@pytest.mark.parametrize("attack", ["pma", "malt", "strong", "square"])
def test_attacks_with_a_loss_of_their_own_refuse_another(attack):
    text = f'loss: got "dlr" with attack "{attack}", which has its own; leave loss out'
    with pytest.raises(RequestError, match=text):
        AttackSettings(attack=attack, loss="dlr")


def test_passes_count_every_part():
    settings = AttackSettings(attack="strong", steps=10, targets=3, n_queries=7, restarts=2)
    assert settings.most_passes(10) == 2 * (2 * 10 * 4 + 7)
    long = AttackSettings(attack="strong", steps=10, targets=3, n_queries=2000, restarts=2)
    assert long.most_passes(10) == 2 * 2 * 10 * 4 + 250 + 2000  # a trial, and a whole Square
    assert AttackSettings(attack="malt", steps=10, targets=3).most_passes(10) == 60
    assert AttackSettings(attack="malt", steps=10, targets=3).most_passes(3) == 40
    assert AttackSettings(attack="square", n_queries=9).most_passes(10) == 9
    assert AttackSettings(steps=10, eot=2).most_passes(10) == 40


class Rounded(nn.Module):
    """A network whose inputs are rounded, so that no gradient arrives."""

    def __init__(self, network, levels=32):
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x):
        return self.network((x * self.levels).round() / self.levels)


class Counted(nn.Module):
    """A network that tells `note`, a function, how many images each pass has."""

    def __init__(self, network, note):
        super().__init__()
        self.network, self.note = network, note

    def forward(self, x):
        self.note(len(x))
        return self.network(x)


def count_images(network, split, **settings):
    """Return how many images strong passes, at a radius that breaks few, and the verdicts."""
    passed = []
    counted = Counted(network, passed.append)
    evaluation = evaluate(
        counted, split, ["Linf 0.001"], attack="strong", steps=3, masking_check=False, **settings
    )
    return sum(passed), evaluation.threats["Linf 0.001"].robust


def test_square_continues_where_gradients_are_masked():
    network, split = few_classes(5)
    settings = {"steps": 3, "n_queries": 600, "masking_check": False}
    evaluations = [
        evaluate(Rounded(network), split, ["Linf 0.1"], attack=attack, **settings)
        for attack in ("square", "pma", "strong")
    ]
    square, pma, strong = (item.threats["Linf 0.1"].robust for item in evaluations)
    assert int((pma & ~square).sum()) > 0  # Square breaks what gradients leave
    assert not bool((strong & ~square).any())


def test_square_ends_early_where_gradients_are_ahead():
    network, split = few_classes(5)
    few, robust = count_images(network, split, n_queries=250)
    many, same = count_images(network, split, n_queries=2500)
    assert int(robust.sum()) > len(split) / 2
    assert torch.equal(robust, same)
    assert many < 2 * few  # a trial of 250 queries in both


def test_further_restarts_of_square_take_all_queries():
    network, split = few_classes(3)
    few, robust = count_images(network, split, n_queries=250, restarts=2)
    many, _ = count_images(network, split, n_queries=500, restarts=2)
    assert many - few >= 250 * int(robust.sum())


def test_malt_tries_no_more_targets_than_it_ranks():
    settings = AttackSettings(attack="malt", targets=150)
    assert [len(list_attempts(settings, classes)) for classes in (3, 101, 102, 1000)] == [
        2,
        100,
        100,
        100,
    ]
    assert len(list_attempts(AttackSettings(loss="targeted dlr", targets=150), 1000)) == 150


@pytest.mark.parametrize(("classes", "text"), [(2, "1 target"), (4, "3 targets")])
def test_the_protocol_counts_the_targets_that_there_are(classes, text):
    record = QueueAttacker(AttackSettings(attack="malt"), classes, 32).protocol()
    record["threats"] = ["Linf 8/255"]
    assert describe_attack(record) == f"MALT 100 steps, {text}, 1 restart, float32"
