"""The plane through three networks: its geometry, its losses, and resuming an interrupted run."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from trained_seed import trained_seed

from robustsoup.attacks import apgd_train
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data, to_float
from robustsoup.diagnosis import landscape as landscape_module
from robustsoup.diagnosis.landscape import Landscape, WeightPlane, landscape, plane_through
from robustsoup.errors import CheckpointError, CoefficientError, RequestError
from robustsoup.models import NetworkSettings, load_model
from robustsoup.reports.planes import load_plane
from robustsoup.settings import LandscapeSettings
from robustsoup.soups.mixing import mix
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train

DIGITS = load_data("digits")
LINF = "Linf 24/255"


def vector_checkpoints(*rows):
    """Make checkpoints whose only parameter is a vector."""
    return [
        Checkpoint({"w": torch.tensor(row, dtype=torch.float64)}, {"parameters": ["w"], "tied": {}})
        for row in rows
    ]


@pytest.fixture(scope="module")
def three():
    base = Checkpoint.of(load_model("resnet9:width=4", channels=1, seed=trained_seed(1)))
    base = train(
        base,
        DIGITS.train,
        threat="clean",
        epochs=4,
        lr=0.1,
        batch_size=64,
        device="cpu",
        precision="float32",
    )
    fine_tuned = [
        train(
            base,
            DIGITS.train,
            threat=t,
            epochs=1,
            lr=0.02,
            batch_size=64,
            seed=trained_seed(3),
            device="cpu",
            precision="float32",
        )
        for t in ("clean", LINF)
    ]
    return [base, *fine_tuned]


def measure_landscape(three, **options):
    settings = {
        "points": 3,
        "samples": 100,
        "attack_steps": 2,
        "calibrate_on": DIGITS.train,
        "calibrate_samples": 64,
        "precision": "float32",
    }
    return landscape(three, DIGITS.test, **({"threat": LINF, "device": "cpu"} | settings | options))


coordinates = st.floats(-5, 5, allow_nan=False).map(lambda v: round(v, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[coordinates] * 4), min_size=3, max_size=3))
def test_coordinates_on_the_plane_match_the_weights(rows):
    w0, w1, w2 = (torch.tensor(row, dtype=torch.float64) for row in rows)
    try:
        plane = plane_through(vector_checkpoints(*rows))
    except CoefficientError:
        spread = torch.stack([w1 - w0, w2 - w0])
        assert torch.linalg.svdvals(spread)[1] <= 0.02 * max(
            float(torch.linalg.svdvals(spread)[0]), 1e-9
        )
        return
    for (x, y), w in zip(plane.positions, (w0, w1, w2), strict=True):
        alpha = plane.alpha(x, y)
        assert sum(alpha) == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(
            alpha[0] * w0 + alpha[1] * w1 + alpha[2] * w2, w, rtol=0, atol=1e-5
        )
    for (x1, y1), (x2, y2) in [
        ((0.3, -0.2), (1.7, 0.9)),
        ((0, 0), (1, 2)),
    ]:
        a, b = (torch.tensor(plane.alpha(*p), dtype=torch.float64) for p in ((x1, y1), (x2, y2)))
        difference = (a - b) @ torch.stack([w0, w1, w2])
        assert float(difference.norm()) == pytest.approx(math.hypot(x1 - x2, y1 - y2), rel=1e-3)


def test_the_grid_extends_a_fifth_beyond_the_networks():
    x, y = WeightPlane(10.0, 3.0, 5.0).axes(15)
    assert (x[0], x[-1], y[0], y[-1]) == pytest.approx((-2, 12, -1, 6))
    assert x[2] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "rows",
    [
        ([0.0, 0.0], [1.0, 1.0], [2.0, 2.0]),
        ([1.0, 0.0], [1.0, 0.0], [2.0, 1.0]),
        ([0.0, 1.0], [3.0, 1.0], [0.0, 1.0]),
    ],
)
def test_three_networks_on_one_line_are_an_error(rows):
    with pytest.raises(CoefficientError, match="lie on one line"):
        plane_through(vector_checkpoints(*rows))


def test_a_plane_needs_three_checkpoints():
    with pytest.raises(CoefficientError, match="got 2 checkpoints, expected 3"):
        plane_through(vector_checkpoints([0.0], [1.0]))


def test_names_are_fitted_as_mix_fits_them(three):
    first, *others = three
    renamed = [{f"module.{name}": t for name, t in item.tensors.items()} for item in others]
    items = [first, *map(Checkpoint, renamed)]
    grid = landscape_module.open_plane(
        items, DIGITS.val, LandscapeSettings(samples=2, buffers="base")
    )
    assert grid.plane == plane_through(three)


def test_a_point_has_the_losses_of_its_mix(three):
    result = measure_landscape(three)
    plane = plane_through(three)
    assert result.positions == plane.positions
    data = DIGITS.test.sample(100, 0)
    for i, j in ((0, 2), (1, 1), (2, 0)):
        soup = mix(
            three,
            plane.alpha(result.x[j], result.y[i]),
            affine=True,
            buffers="recalibrate",
            calibrate_on=DIGITS.train,
            calibrate_samples=64,
        )
        network = soup.network()
        x = to_float(data.images).contiguous(memory_format=torch.channels_last)
        x_adv = apgd_train(network.eval(), x, data.labels, ThreatModel.parse(LINF), steps=2)
        for points, loss, accuracy in (
            (x, result.clean_loss, result.clean_accuracy),
            (x_adv, result.loss, result.accuracy),
        ):
            logits = network(points).detach()
            assert loss[i][j] == pytest.approx(
                float(functional.cross_entropy(logits, data.labels)), rel=1e-4
            )
            assert accuracy[i][j] == pytest.approx(
                float((logits.argmax(1) == data.labels).float().mean())
            )
    assert all(
        a > b
        for r, c in zip(result.loss, result.clean_loss, strict=True)
        for a, b in zip(r, c, strict=True)
    )


def test_base_statistics_default_to_the_first_checkpoint(three):
    first, last = (
        measure_landscape(three, buffers="base", base=three[0]),
        measure_landscape(three, buffers="base", base=three[2]),
    )
    assert first.loss != last.loss
    assert first.buffers == "base"
    assert measure_landscape(three, buffers="base").loss == first.loss


def test_the_recorded_ancestor_is_not_the_base_of_a_plane(three, tmp_path):
    """Unlike `mix`, a plane ignores the ancestor that the records name."""
    base = Checkpoint.of(load_model("resnet9:width=4", channels=1, seed=8))
    base.save(tmp_path / "base.safetensors")
    parents = [{"digest": base.digest, "file": "base.safetensors"}]
    for number, item in enumerate(three):
        item.with_provenance(parents=parents).save(tmp_path / f"{number}.safetensors")
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    assert mix(files, [0, 0, 1], affine=True).provenance["buffers"]["base"] == base.digest
    assert (
        measure_landscape(files, buffers="base").loss
        == measure_landscape(three, buffers="base").loss
    )
    assert (
        measure_landscape(files, buffers="base", base=tmp_path / "base.safetensors").loss
        != measure_landscape(three, buffers="base").loss
    )


def test_the_given_network_does_not_change(three):
    network = three[0].network().train()
    measure_landscape(three, points=2, samples=20, network=network)
    assert Checkpoint.of(network).digest == three[0].digest
    assert network.training


def test_an_interrupted_run_resumes_with_the_same_result(three, tmp_path, monkeypatch):
    whole = measure_landscape(three)
    monkeypatch.setattr(landscape_module.SavedState, "due", lambda self: True)

    def stop(done, total, figures):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_landscape(three, state_path=tmp_path / "state.pt", on_progress=stop)
    seen = []
    resumed = measure_landscape(
        three,
        state_path=tmp_path / "state.pt",
        on_progress=lambda done, total, figures: seen.append(done),
    )
    assert seen == [5, 6, 7, 8, 9]
    assert resumed == whole
    with pytest.raises(CheckpointError, match="other settings"):
        measure_landscape(three, state_path=tmp_path / "state.pt", seed=1)


def test_another_network_with_equal_weights_does_not_resume(three, tmp_path):
    plain = three[0].network()
    scaled = three[0].network()
    scaled.register_forward_hook(lambda layer, inputs, logits: 2 * logits)
    scaled.network_settings = NetworkSettings("scaled")
    unscaled = measure_landscape(
        three, points=2, samples=20, network=plain, state_path=tmp_path / "state.pt"
    )
    with pytest.raises(CheckpointError, match="state"):
        measure_landscape(
            three, points=2, samples=20, network=scaled, state_path=tmp_path / "state.pt"
        )
    assert measure_landscape(three, points=2, samples=20, network=scaled).loss != unscaled.loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_single_sample_is_enough(three, precision):
    result = measure_landscape(three, points=2, samples=1, precision=precision)
    assert result.samples == 1


def test_save_and_load(three, tmp_path):
    result = measure_landscape(three)
    result.save(tmp_path / "plane.json")
    loaded = Landscape.load(tmp_path / "plane.json")
    assert loaded.loss == [list(row) for row in result.loss]
    (tmp_path / "plane.json").write_text(json.dumps({"x": []}))
    with pytest.raises(CheckpointError, match="not a saved landscape"):
        Landscape.load(tmp_path / "plane.json")


def test_a_changed_landscape_is_noticed(three, tmp_path):
    path = measure_landscape(three, points=2, samples=1).save(tmp_path / "plane.json")
    content = json.loads(path.read_text())
    content["loss"][0][0] = 0.125
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"plane\.json: .*its content changed"):
        Landscape.load(path)
    with pytest.raises(RequestError, match=r"plane\.json: .*its content changed"):
        load_plane(path, "plane")
    del content["digest"]  # as in files of other programs
    path.write_text(json.dumps(content))
    assert Landscape.load(path).loss[0][0] == load_plane(path, "plane").loss[0, 0] == 0.125


def test_a_loss_that_is_not_finite_is_none():
    assert landscape_module._split_losses([1.0, math.nan, math.inf, 2.0], 2) == (
        (1.0, None),
        (None, 2.0),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, "points: got 1, expected at least 2"),
        ({"attack_steps": 0}, "attack_steps: got 0"),
        ({"buffers": "average"}, 'buffers: got "average", expected one of base, recalibrate'),
        ({"calibrate_on": None}, "requires training data"),
    ],
)
def test_invalid_settings_are_errors(three, options, message):
    with pytest.raises(RequestError, match=message):
        measure_landscape(three, **options)


def test_samples_are_drawn_by_the_seed():
    one, two = DIGITS.test.sample(50, 0), DIGITS.test.sample(50, 1)
    assert len(one) == len(set(one.ids.tolist())) == 50
    assert one.ids.tolist() != two.ids.tolist()
    assert one.ids.tolist() == DIGITS.test.sample(50, 0).ids.tolist()
    assert set(one.ids.tolist()) <= set(DIGITS.test.ids.tolist())
    at = {int(i): k for k, i in enumerate(DIGITS.test.ids)}
    torch.testing.assert_close(one.images[7], DIGITS.test.images[at[int(one.ids[7])]])
