"""Subspaces: the draws, the shares of the ends, what their records say, and resuming."""

from collections import Counter

import pytest
import torch
from torch import nn
from trained_seed import trained_seed
from training_helpers import DATA, LINF, Killed, fresh_network, kill_at

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import to_float
from robustsoup.errors import CoefficientError, RequestError
from robustsoup.settings import TrainSettings
from robustsoup.soups import subspace
from robustsoup.soups.mixing import mix
from robustsoup.soups.subspace import (
    SubspaceRun,
    check_subspace,
    draw_point,
    point_on_line,
    spans_subspace,
    train_subspace,
)
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.objectives import Objective
from robustsoup.training.train import TrainingInputs, train

WEAK = ThreatModel("Linf", 8 / 255)
QUICK = {"epochs": 2, "batch_size": 32, "lr": 0.1, "device": "cpu", "precision": "float32"}


def train_line(network=None, threats=(LINF, WEAK), **changes):
    """Train a line for two epochs of three steps."""
    arguments = QUICK | {"seed": trained_seed()} | changes
    return train_subspace(
        fresh_network() if network is None else network, DATA, threats, **arguments
    )


def make_run(threats=(LINF, CLEAN), by="eps", **changes):
    settings = TrainSettings(
        threat=threats[0],
        **({"objective": Objective.parse("ce"), "precision": "float32", "lr": 0.5} | changes),
    )
    inputs = TrainingInputs(DATA, None, None, settings)
    return SubspaceRun(fresh_network(), inputs, threats, by)


@pytest.fixture(scope="module")
def line():
    return train_line()


# Draws.


@pytest.mark.parametrize("ends", [2, 3])
def test_each_end_and_the_inside_take_the_same_share_of_the_steps(ends):
    points = [draw_point(ends, 0, step) for step in range(3000)]
    assert all(sum(point) == pytest.approx(1) and min(point) >= 0 for point in points)
    places = Counter(point.index(1.0) if 1.0 in point else "inside" for point in points)
    assert set(places) == {*range(ends), "inside"}
    assert all(0.85 < count * (ends + 1) / 3000 < 1.15 for count in places.values())
    inside = torch.tensor([point for point in points if 1.0 not in point])
    assert inside.mean(0).tolist() == pytest.approx([1 / ends] * ends, abs=0.05)
    assert float(inside[:, 0].std()) > 0.2  # not around the middle alone
    assert points[:5] == [draw_point(ends, 0, step) for step in range(5)]
    assert points[:20] != [draw_point(ends, 1, step) for step in range(20)]


@pytest.mark.parametrize(("ends", "share"), [(2, 0.0), (2, 0.5), (3, 1.0)])
def test_the_share_of_the_ends_can_be_set(ends, share):
    points = [draw_point(ends, 0, step, share) for step in range(3000)]
    places = Counter(point.index(1.0) if 1.0 in point else "inside" for point in points)
    assert places["inside"] == pytest.approx(3000 * (1 - share), abs=150)
    for end in range(ends):
        assert places[end] == pytest.approx(3000 * share / ends, abs=150)


def test_the_share_of_the_ends_changes_the_line_and_its_record(line):
    uniform = train_line(at_ends=0.0)
    assert uniform[0].provenance["subspace"]["at_ends"] == 0
    assert "at_ends" not in line[0].provenance["subspace"]
    assert uniform[0].digest != line[0].digest
    with pytest.raises(RequestError, match="at_ends: got 2, expected a number from 0 to 1"):
        train_line(at_ends=2)


# One step.


def test_a_step_sends_each_end_its_share_of_the_gradient(monkeypatch):
    run = make_run(momentum=0.0)
    monkeypatch.setattr(subspace, "draw_point", lambda *key: (0.75, 0.25))
    before = [[p.detach().clone() for p in end.parameters()] for end in run.ends]
    run.take_step(to_float(DATA.images[:32]), DATA.labels[:32])
    for end, old, weight in zip(run.ends, before, (0.75, 0.25), strict=True):
        for new, start, mixed in zip(end.parameters(), old, run.model.parameters(), strict=True):
            torch.testing.assert_close(new.detach(), start - 0.5 * weight * mixed.grad)
    assert any(float(p.grad.abs().max()) > 0 for p in run.model.parameters())


def test_a_step_at_an_end_is_a_step_of_training_and_leaves_the_other_end(monkeypatch):
    run = make_run(momentum=0.0)
    monkeypatch.setattr(subspace, "draw_point", lambda *key: (0.0, 1.0))
    first = {name: tensor.clone() for name, tensor in run.ends[0].state_dict().items()}
    expected = replace_clean_step(run)
    run.take_step(*expected["batch"])
    for name, tensor in run.ends[1].state_dict().items():
        torch.testing.assert_close(tensor, expected["after"][name])
    for name, tensor in run.ends[0].state_dict().items():
        assert torch.equal(tensor, first[name]) or name.endswith("num_batches_tracked")


def replace_clean_step(run):
    """Return a batch, and the state of the network after a step of clean training on it."""
    x, y = to_float(DATA.images[:32]), DATA.labels[:32]
    network = fresh_network().train()
    loss = torch.nn.functional.cross_entropy(network(x), y)
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.5 * parameter.grad
    return {"batch": (x, y), "after": network.state_dict()}


def test_the_mixed_point_is_that_of_mix():
    run = make_run()
    with torch.no_grad():
        for number, end in enumerate(run.ends):
            for parameter in end.parameters():
                parameter.add_(0.1 * (number + 1))
    run.mix((0.25, 0.75))
    expected = mix([Checkpoint.of(end) for end in run.ends], [0.25, 0.75])
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected.tensors[name])


def test_the_radius_changes_along_the_line():
    run = make_run((LINF, WEAK))
    threat, objective = run._goal((0.5, 0.5))
    assert threat.eps == pytest.approx((LINF.eps + WEAK.eps) / 2)
    assert str(objective) == "ce"
    to_clean = make_run((LINF, CLEAN))
    assert to_clean._goal((0.25, 0.75))[0].eps == pytest.approx(LINF.eps / 4)
    assert to_clean._goal((0.0, 1.0))[0].is_clean


def test_threats_of_other_norms_are_drawn_by_weight():
    l2 = ThreatModel("L2", 1.0)
    run, drawn = make_run((LINF, l2)), []
    for step in range(40):
        run.step = step
        drawn.append(run._goal((0.5, 0.5))[0])
    assert set(drawn) == {LINF, l2}
    assert run._goal((1.0, 0.0))[0] == LINF


def test_the_weight_of_the_clean_loss_can_change_instead():
    threat, objective = make_run(by="objective")._goal((0.75, 0.25))
    assert threat == LINF
    assert objective.clean_weight == 0.25


def test_a_middle_end_may_share_the_first_threat_or_be_clean():
    for middle in (LINF, CLEAN):
        check_subspace((LINF, middle, CLEAN), TrainSettings(threat=LINF), "objective")


def test_labels_are_smoothed_at_every_point():
    objective = make_run(by="objective", label_smoothing=0.3)._goal((0.75, 0.25))[1]
    assert objective == Objective.parse("mixed 0.25").with_label_smoothing(0.3)


def test_complex_parameters_are_mixed_too():
    class Phase(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.phase = fresh_network(), nn.Parameter(torch.ones(10) + 0j)

        def forward(self, x):
            return self.network(x) * self.phase.real

    settings = TrainSettings(threat=LINF, objective=Objective.parse("ce"), precision="float32")
    run = SubspaceRun(Phase(), TrainingInputs(DATA, None, None, settings), (LINF, WEAK), "eps")
    with torch.no_grad():
        run.ends[1].phase.copy_(torch.full((10,), 3j))
    run.mix((0.5, 0.5))
    assert torch.equal(run.model.phase, torch.full((10,), 0.5 + 1.5j))


# Whole runs.


def test_the_ends_are_checkpoints_that_know_their_subspace(line, tmp_path):
    for number, (end, threat) in enumerate(zip(line, (LINF, WEAK), strict=True)):
        record = end.provenance
        assert record["training"]["threat"] == str(threat)
        assert record["trained_on"] == ["train"]
        assert record["subspace"]["position"] == number
        assert record["subspace"]["ends"] == [str(LINF), str(WEAK)]
        end.save(tmp_path / f"{number}.safetensors")
        assert Checkpoint.load(tmp_path / f"{number}.safetensors").digest == end.digest
    assert line[0].digest != line[1].digest
    assert spans_subspace(line)
    assert not spans_subspace(line[:1])
    assert not spans_subspace([line[0], train_line(epochs=1)[1]])
    tuned = train(line[0], DATA, threat=LINF, **(QUICK | {"epochs": 1}))
    assert "subspace" not in tuned.provenance


def test_a_position_is_a_pair_of_weights_in_any_order(line):
    assert point_on_line(line, 0.25) == [0.75, 0.25]
    assert point_on_line(line[::-1], 0.25) == [0.25, 0.75]
    for ends, t in ((line, 1.5), (line[:1], 0.5), ([line[0], line[0]], 0.5)):
        with pytest.raises(CoefficientError, match="--at: "):
            point_on_line(ends, t)


def test_statistics_of_the_ends_are_measured_anew():
    end = train_line(threats=(LINF, CLEAN), epochs=1)[1]
    arguments = {"calibrate_on": DATA, "seed": trained_seed(), "device": "cpu"}
    measured = mix([end], [1.0], buffers="recalibrate", **arguments)
    names = [name for name in end.tensors if name.endswith("running_mean")]
    assert names
    for name in names:
        torch.testing.assert_close(end.tensors[name], measured.tensors[name])


def test_a_killed_run_resumes_bit_for_bit(line, tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        train_line(state_path=path, on_progress=kill_at(4))
    resumed = train_line(state_path=path)
    assert [end.digest for end in resumed] == [end.digest for end in line]


def test_a_triangle_has_three_ends_and_leaves_its_network_alone():
    network = fresh_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ends = train_line(network, (LINF, WEAK, "clean"), objective="trades", epochs=1)
    assert [end.provenance["subspace"]["shape"] for end in ends] == ["triangle"] * 3
    assert len({end.digest for end in ends}) == 3
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    with pytest.raises(CoefficientError, match="the two ends of one line"):
        point_on_line(ends[:2], 0.5)


def test_several_threats_hold_at_every_point():
    also = ("Linf 16/255",)  # between the ends
    ends = train_line(threats=(LINF, "Linf 4/255"), also=also, combine="random", epochs=1)
    assert ends[1].provenance["training"]["also"] == ["Linf 16/255"]


@pytest.mark.parametrize(
    ("threats", "changes", "message"),
    [
        ((LINF,), {}, "threats: got 1, expected one for each end: 2 for a line"),
        ("Linf 8/255", {}, "threats: got 1, expected one for each end"),
        ((LINF, WEAK, CLEAN, CLEAN), {}, "threats: got 4"),
        ((WEAK, LINF), {}, "expected an order from robust to clean"),
        ((LINF, CLEAN, "L2 1.0"), {}, "expected an order from robust to clean"),
        ((LINF, CLEAN), {"by": "radius"}, 'by: got "radius", expected one of eps, objective'),
        ((LINF, WEAK), {"by": "objective"}, "expected a threat first and clean last"),
        ((LINF, "L2 0.5", CLEAN), {"by": "objective"}, "and no other threat between them"),
        ((LINF, WEAK, CLEAN), {"by": "objective"}, "and no other threat between them"),
        ((CLEAN, CLEAN), {"by": "objective"}, "expected a threat first and clean last"),
        ((LINF, CLEAN), {"by": "objective", "objective": "trades"}, "which weighs the clean loss"),
        ((LINF, CLEAN), {"ema": 0.9}, "ema: a subspace is trained without it"),
        ((LINF, CLEAN), {"early_stop": True}, "early_stop: a subspace is trained without it"),
        ((LINF, CLEAN), {"also": ("L2 1.0",), "combine": "max"}, "leave no clean end"),
        ((LINF, WEAK), {"also": (WEAK,), "combine": "max"}, "which is the threat of an end"),
        ((LINF, WEAK), {"threat": "L2 1.0"}, "threat: the ends have threats of their own"),
        ((LINF, CLEAN), {"epoch": 1}, 'unknown setting "epoch"; did you mean "epochs"'),
    ],
)
def test_wrong_requests_are_refused_in_one_line(threats, changes, message):
    with pytest.raises(RequestError, match=message) as error:
        train_line(threats=threats, **changes)
    assert "\n" not in str(error.value)
