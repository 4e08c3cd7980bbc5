"""Several threats in training and learning: max, mean and random."""

import pytest
import torch
from learning_helpers import learn_digits, resnet_ingredients
from training_helpers import DATA, LINF, VAL, Killed, fresh_network, kill_at, train_digits

from robustsoup.attacks import apgd_train
from robustsoup.attacks.losses import ce
from robustsoup.data import to_float
from robustsoup.errors import RequestError
from robustsoup.settings import LearnSettings, TrainSettings, to_record
from robustsoup.threats import ThreatModel
from robustsoup.training.adversarial_loss import (
    attack_under_all,
    mean_objective_loss,
    measure_robust_loss,
    objective_loss,
)
from robustsoup.training.objectives import Objective

L2 = ThreatModel("L2", 2.0)
WEAK = ThreatModel("Linf", 1e-6)
CE = Objective.parse("ce")


@pytest.fixture(scope="module")
def batch():
    split = DATA.first(8)
    return to_float(split.images), split.labels


@pytest.fixture
def model(batch):
    """A network whose logits differ much between images."""
    network = fresh_network().train()
    with torch.no_grad():
        network.linear.weight *= 100
        for _ in range(20):  # the running statistics become those of the batch
            network(batch[0])
    return network.eval()


def settings_of(combine, *also, **changes):
    arguments = {"threat": LINF, "also": also, "combine": combine, "precision": "float32"}
    return TrainSettings(**(arguments | changes))


def attack_alone(model, batch, threat):
    return apgd_train(model, *batch, threat, steps=2)


def test_mean_attacks_under_each_threat_and_averages_the_losses(model, batch):
    attacked = attack_under_all(model, batch, settings_of("mean", L2), CE, step=0)
    expected = [attack_alone(model, batch, threat) for threat in (LINF, L2)]
    assert all(torch.equal(a, b) for a, b in zip(attacked, expected, strict=True))
    loss = mean_objective_loss(model, batch[0], attacked, batch[1], CE, precision="float32")
    singles = [
        objective_loss(model, batch[0], x, batch[1], CE, precision="float32") for x in expected
    ]
    torch.testing.assert_close(loss, (singles[0] + singles[1]) / 2)


def test_max_takes_the_worst_threat_of_each_image(model, batch):
    (attacked,) = attack_under_all(model, batch, settings_of("max", L2), CE, step=0)
    points = [attack_alone(model, batch, threat) for threat in (LINF, L2)]
    with torch.no_grad():
        losses = torch.stack([ce(model(x), batch[1]) for x in points])
        torch.testing.assert_close(ce(model(attacked), batch[1]), losses.amax(0))
    rows = range(len(attacked))
    assert all(any(torch.equal(attacked[i], x[i]) for x in points) for i in rows)
    (beside_weak,) = attack_under_all(model, batch, settings_of("max", WEAK), CE, step=0)
    assert torch.equal(beside_weak, points[0])


def test_random_draws_one_threat_for_each_step(model, batch):
    settings = settings_of("random", L2)
    points = {str(threat): attack_alone(model, batch, threat) for threat in (LINF, L2)}
    drawn = []
    for step in range(12):
        (attacked,) = attack_under_all(model, batch, settings, CE, step=step)
        drawn += [name for name, x in points.items() if torch.equal(attacked, x)]
    assert len(drawn) == 12
    assert set(drawn) == {str(LINF), str(L2)}
    (again,) = attack_under_all(model, batch, settings, CE, step=3)
    assert torch.equal(again, points[drawn[3]])


def test_max_of_trades_compares_with_the_clean_logits(model, batch):
    (attacked,) = attack_under_all(
        model, batch, settings_of("max", WEAK), Objective.parse("trades"), step=0
    )
    moved = (attacked - batch[0]).abs().amax((1, 2, 3))
    assert bool((moved > 2 * WEAK.eps).all())


def test_training_records_its_threats_and_resumes(tmp_path):
    arguments = {"also": (L2,), "combine": "max", "val": VAL}
    whole = train_digits(**arguments)
    record = whole.provenance["training"]
    assert (record["also"], record["combine"]) == (["L2 2.0"], "max")
    model = whole.network()
    losses = [measure_robust_loss(model, VAL, threat)[0] for threat in (LINF, L2)]
    assert whole.provenance["history"][-1]["robust_loss"] == pytest.approx(sum(losses) / 2)
    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        train_digits(**arguments, state_path=path, on_progress=kill_at(4))
    assert train_digits(**arguments, state_path=path).digest == whole.digest


def test_learning_takes_several_threats():
    items = resnet_ingredients(2)
    learned = learn_digits(items, also=["L2 2.0"], combine="mean")
    assert learned.record["learning"]["also"] == ["L2 2.0"]
    assert not torch.equal(learned.alpha, learn_digits(items).alpha)


def test_one_threat_leaves_the_record_as_it_was():
    assert not {"also", "combine"} & set(to_record(TrainSettings()))
    assert to_record(settings_of("random", L2))["also"] == ["L2 2.0"]


@pytest.mark.parametrize("kind", [TrainSettings, LearnSettings])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"also": ("clean",), "combine": "max"}, "clean is no attack to combine with others"),
        ({"also": ("Linf 8/255",), "combine": "max"}, "got Linf 8/255 twice"),
        ({"also": ("L2 0.5",)}, r"combine: got 2 threats \(Linf 8/255, L2 0.5\), expected max"),
        ({"combine": "mean"}, "combine: got mean with one threat"),
        ({"also": ("L2 0.5",), "combine": "min"}, "combine: got .min., expected one of max"),
    ],
)
def test_combinations_without_sense_are_refused(kind, changes, message):
    with pytest.raises(RequestError, match=message):
        kind(**changes)


def test_a_dial_has_one_threat():
    with pytest.raises(RequestError, match="a dial turns one threat"):
        LearnSettings(also=("L2 0.5",), combine="max", dial={})
