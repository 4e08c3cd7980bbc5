"""Mixing networks with parametrizations, and weights of rarer types."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError
from robustsoup.soups.ingredients import Ingredients
from robustsoup.soups.mixing import mix

CPU = torch.device("cpu")


def build(wrap, seed=0):
    """Return a network with `wrap` applied to each layer, after some passes in train mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
        model = nn.Sequential(*(wrap(m) if hasattr(m, "weight") else m for m in layers))
        for _ in range(30):
            model(torch.rand(2, 1, 4, 4))
    return model.eval()


@torch.no_grad()
def largest_values(model):
    """Return the largest singular value of each weight that a network computes with."""
    model(torch.rand(2, 1, 4, 4))
    layers = [m for m in model if hasattr(m, "weight")]
    weights = [m.weight.transpose(0, 1) if i == 1 else m.weight for i, m in enumerate(layers)]
    return [float(torch.linalg.matrix_norm(w.flatten(1), 2)) for w in weights]


SPECTRAL = [spectral_norm, parametrizations.spectral_norm]


@pytest.mark.parametrize("wrap", SPECTRAL, ids=["old", "new"])
@pytest.mark.parametrize("named", [False, True])
def test_a_mix_has_the_vectors_of_its_own_weight(wrap, named):
    first, second = build(wrap, 0), build(wrap, 1)
    files = [Checkpoint(dict(model.state_dict())) for model in (first, second)]
    soup = mix(files, [0.4, 0.6], network=first if named else None)
    fresh = build(wrap, 2)
    soup.load_into(fresh)
    assert largest_values(fresh) == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("wrap", SPECTRAL, ids=["old", "new"])
def test_a_network_mixed_with_its_twin_of_turned_vectors_is_that_network(wrap):
    model = build(wrap)
    state = model.state_dict()
    turned = {name: -t if name.endswith(("_u", "_v")) else t for name, t in state.items()}
    soup = mix([Checkpoint(dict(state)), Checkpoint(turned)], [0.5, 0.5])
    fresh = build(wrap, 3)
    soup.load_into(fresh)
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.parametrize(
    "wrap",
    [
        *(*SPECTRAL, weight_norm, parametrizations.weight_norm, parametrizations.orthogonal),
        lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m)),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_without_a_record_the_same_tensors_are_mixed(wrap):
    model = build(lambda m: m if isinstance(m, nn.ConvTranspose2d) else wrap(m))
    recorded = Checkpoint.of(model)
    assert set(Checkpoint(recorded.tensors).parameters) == set(recorded.parameters)


def test_vectors_of_a_weight_behind_another_parametrization_are_copied():
    def wrap(layer):
        return parametrizations.spectral_norm(parametrizations.weight_norm(layer))

    items = [Checkpoint(dict(build(wrap, seed).state_dict())) for seed in (0, 1)]
    for alpha, source in (([0.4, 0.6], items[0]), ([0.0, 1.0], items[1])):
        soup = mix(items, alpha)
        for vector in ("_u", "_v"):
            name = f"0.parametrizations.weight.1.{vector}"
            assert torch.equal(soup.tensors[name], source.tensors[name])


def test_complex_and_small_numbers_are_averaged_as_what_they_are():
    first = {
        "complex": torch.tensor([1 + 2j, 3j]),
        "half": torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
        "eighth": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        "step": torch.tensor(5),
    }
    second = {
        "complex": torch.tensor([3 + 0j, 1j]),
        "half": torch.tensor([2.0, 5.0], dtype=torch.bfloat16),
        "eighth": torch.tensor([2.0, 4.0]).to(torch.float8_e4m3fn),
        "step": torch.tensor(7),
    }
    soup = mix([Checkpoint(first), Checkpoint(second)], [0.5, 0.5]).tensors
    assert soup["complex"].tolist() == [2 + 1j, 2j]
    assert soup["half"].tolist() == [1.5, 4.0]
    assert soup["eighth"].float().tolist() == [1.5, 3.0]
    assert soup["step"].item() == 5
    assert [soup[name].dtype for name in first] == [tensor.dtype for tensor in first.values()]


def test_the_gradient_of_complex_weights_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, dtype=torch.complex64, generator=generator) for _ in range(3)]
    ingredients = Ingredients([Checkpoint({"w": row}) for row in rows], ["w"], CPU, "memory")
    alpha = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    mixed = sum(a * row for a, row in zip(alpha, rows, strict=True))
    mixed.retain_grad()
    (mixed.abs() ** 3).sum().backward()
    inner = ingredients.inner({"w": mixed.grad})
    torch.testing.assert_close(inner[0].float(), alpha.grad, rtol=1e-4, atol=1e-4)
    target = nn.Parameter(torch.zeros(5, dtype=torch.complex64))
    ingredients.mix_into("w", alpha.tolist(), target)
    torch.testing.assert_close(target.detach(), mixed.detach())


@pytest.mark.parametrize(
    "name",
    [
        *("conv.lora_A.weight", "base.q.lora_B.default.weight", "lora_up.w", "q.hada_w1_a"),
        *("q.lokr_w1", "q.lokr_w2_b.default", "q.oft_r.default", "q.oft_R.default.weight"),
        *("q.vera_lambda_b", "q.lora_E"),
    ],
)
def test_factors_of_adapters_are_not_averaged(name):
    item = Checkpoint({name: torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"LoRA.*merged into its base"):
        mix([item, copy.copy(item)], [0.5, 0.5])
    assert mix([item], [1.0]).digest == item.digest
