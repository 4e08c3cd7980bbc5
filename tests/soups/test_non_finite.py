"""NaN and infinite weights are never written as a soup."""

import math

import pytest
import torch
from digits import digits_network
from torch import nn

import robustsoup as rs
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError, RobustsoupError
from robustsoup.soups.coefficients import Coefficients, Dial

BAD = [math.nan, math.inf, -math.inf]
PARAMETER, STATISTIC = "prep.0.weight", "prep.1.running_var"
ENDINGS = [".safetensors", ".pt", ".pth", ".bin"]


def ingredients(bad=None, tensor=PARAMETER):
    """Return two checkpoints of one network; with `bad`, the second holds it in a tensor."""
    first, second = (Checkpoint.of(digits_network(2)) for _ in range(2))
    tensors = {name: value.clone() for name, value in second.tensors.items()}
    if bad is not None:
        tensors[tensor].view(-1)[-1] = bad
    return first, Checkpoint(tensors, second.provenance)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("tensor", [PARAMETER, STATISTIC])
def test_a_checkpoint_with_nan_or_infinity_is_not_written(bad, ending, tensor, tmp_path):
    path = tmp_path / f"soup{ending}"
    with pytest.raises(CheckpointError, match=f"soup{ending}: not written: {tensor} holds NaN"):
        ingredients(bad, tensor)[1].save(path)
    assert list(tmp_path.iterdir()) == []


class Masked(nn.Module):
    """A network of digits with a constant that holds infinities."""

    def __init__(self, value=-math.inf):
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.register_buffer("target_mask", torch.full((3, 3), value).triu(1))
        self.register_buffer("bounds", torch.tensor([-math.inf, 0.5, math.inf]))

    def forward(self, x):
        return self.head(x.flatten(1)) + self.target_mask.softmax(1).sum() - 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_constant_buffers_may_hold_infinity(ending, tmp_path):
    data = rs.load_data("digits").train.first(32)
    trained = rs.train(Masked(), data, threat="clean", epochs=1, device="cpu")
    paths = [Checkpoint.of(Masked()).save(tmp_path / f"0{ending}")]
    paths.append(trained.save(tmp_path / f"1{ending}"))
    if ending != ".safetensors":  # no record: only a mask is known as a constant
        with pytest.raises(CheckpointError, match="bounds holds NaN or infinity"):
            rs.mix(paths, [0.5, 0.5])
        for path in paths:
            state = torch.load(path)
            torch.save({name: t for name, t in state.items() if name != "bounds"}, path)
    soup = rs.mix(paths, [0.5, 0.5])
    soup.save(tmp_path / f"soup{ending}")
    read = Checkpoint.load(tmp_path / f"soup{ending}")
    assert torch.equal(read.tensors["target_mask"], Masked().target_mask)
    assert read.parameters == ["head.weight", "head.bias"]
    if ending == ".safetensors":
        read.load_into(Masked())


@pytest.mark.parametrize(
    "fit",
    [
        lambda *given, **options: rs.train(*given, threat="clean", **options),
        lambda *given, **options: rs.train_subspace(*given, ["Linf 8/255", "clean"], **options),
    ],
    ids=["train", "train_subspace"],
)
def test_a_buffer_of_nan_is_refused_before_training(fit):
    data = rs.load_data("digits").train.first(32)
    with pytest.raises(CheckpointError, match="network: target_mask holds NaN"):
        fit(Masked(math.nan), data, on_progress=pytest.fail)


def test_training_keeps_constants_with_infinity():
    data = rs.load_data("digits").train.first(32)
    averaged = rs.train(Masked(), data, threat="clean", epochs=1, ema=0.9, device="cpu")
    threats = ["Linf 8/255", "clean"]
    ends = rs.train_subspace(Masked(), data, threats, epochs=2, batch_size=8, device="cpu")
    for item in (averaged, *ends):
        assert torch.equal(item.tensors["target_mask"], Masked().target_mask)
        assert torch.equal(item.tensors["bounds"], Masked().bounds)


@pytest.mark.parametrize("bad", BAD)
def test_an_earlier_file_stays(bad, tmp_path):
    path = ingredients()[0].save(tmp_path / "soup.safetensors")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="not written"):
        ingredients(bad)[1].save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("alpha", [[0.5, 0.5], [0.0, 1.0]])
@pytest.mark.parametrize("tensor", [PARAMETER, STATISTIC])
def test_a_mix_names_the_tensor_and_the_ingredient(bad, alpha, tensor):
    items = ingredients(bad, tensor)
    with pytest.raises(CheckpointError, match=rf"{tensor} holds NaN or infinity: so does "):
        rs.mix(items, alpha)
    assert rs.mix(items, [1.0, 0.0], buffers="base", base=items[0]).digest == items[0].digest


def test_a_sum_beyond_the_range_of_the_dtype_is_refused():
    items = []
    for item in ingredients():
        tensors = {
            name: value.half() if value.is_floating_point() else value
            for name, value in item.tensors.items()
        }
        sign = 1 - 2 * len(items)
        tensors[PARAMETER] = torch.full_like(tensors[PARAMETER], sign * 60_000.0)
        items.append(Checkpoint(tensors, item.provenance))
    with pytest.raises(CheckpointError, match=rf"{PARAMETER}.*leaves the range of torch.float16"):
        rs.mix(items, [1.5, -0.5], affine=True)


@pytest.mark.parametrize("bad", BAD)
def test_a_buffer_policy_cannot_add_nan(bad, monkeypatch):
    def policy(unfinished):
        from robustsoup.soups.mixing import Buffers

        return Buffers({STATISTIC: torch.full_like(items[0].tensors[STATISTIC], bad)}, {})

    items = ingredients()
    monkeypatch.setattr("robustsoup.soups.buffers.average", policy, raising=False)
    with pytest.raises(CheckpointError, match=STATISTIC):
        rs.mix(items, [0.5, 0.5], buffers="average")


@pytest.mark.parametrize("bad", BAD)
def test_coefficients_and_dials_are_not_written(bad, tmp_path):
    layered = {"layers": ("all",), "ingredients": ("a", "b")}
    alpha = torch.tensor([[0.5, bad]], dtype=torch.float64)
    line = torch.stack([alpha, torch.zeros_like(alpha)])
    tracked = {STATISTIC: torch.tensor([1.0, bad])}
    for item in (
        Coefficients(alpha, **layered),
        Coefficients(torch.tensor([[0.5, 0.5]], dtype=torch.float64), **layered, tracked=tracked),
        Dial(line, **layered, record={}),
    ):
        with pytest.raises(RobustsoupError, match="holds NaN or infinity"):
            item.save(tmp_path / "coefficients.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_learning_and_searching_refuse_such_ingredients():
    data, network = rs.load_data("digits"), digits_network(2)
    with pytest.raises(RobustsoupError, match="NaN or infinity"):
        rs.learn(ingredients(math.nan), data.train.first(64), network=network, epochs=1)
    with pytest.raises(RobustsoupError, match="NaN or infinity"):
        rs.search(ingredients(math.nan), data.val.first(8), [], network=network)
