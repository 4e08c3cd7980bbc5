"""Granularity: which parameters share one set of coefficients."""

import pytest
from torch import nn

from robustsoup.errors import RequestError
from robustsoup.models import load_model
from robustsoup.soups.granularity import layer_groups

WIDE, PREACT = "wide_resnet:depth=16,width=1", "preact_resnet18:width=2"
NETS = {
    spec: load_model(spec)
    for spec in ("resnet9:width=2", "resnet18:width=2", "resnet50:width=2", WIDE, PREACT)
}
NETS["wrapped"] = nn.Sequential(nn.Identity(), load_model("resnet18:width=2"))
BLOCKS = {
    "resnet9:width=2": ["prep", "layer1", "residual1", "layer2", "layer3", "residual3", "linear"],
    "resnet18:width=2": [
        "conv1",
        "bn1",
        *(f"layer{s}.{b}" for s in range(1, 5) for b in range(2)),
        "linear",
    ],
    "resnet50:width=2": [
        "conv1",
        "bn1",
        *(f"layer{s + 1}.{b}" for s, depth in enumerate((3, 4, 6, 3)) for b in range(depth)),
        "linear",
    ],
    WIDE: [
        "init_conv",
        *(f"layer.{g}.block.{b}" for g in range(3) for b in range(2)),
        "batchnorm",
        "logits",
    ],
    PREACT: [
        "conv_2d",
        *(f"layer_{s}.{b}" for s in range(4) for b in range(2)),
        "batchnorm",
        "logits",
    ],
}


@pytest.mark.parametrize("spec", NETS)
@pytest.mark.parametrize(
    "granularity", ["parameter", "module", "block", "model", "re:weight", r"re:layer\D?(\d)\D+(\d)"]
)
def test_every_parameter_is_in_one_layer_and_in_order(spec, granularity):
    groups = layer_groups(NETS[spec], granularity)
    everything = [name for inner in groups.values() for name in inner]
    names = [name for name, _ in NETS[spec].named_parameters()]
    assert sorted(everything) == sorted(names)
    assert list(groups) == sorted(groups, key=lambda layer: names.index(groups[layer][0]))


@pytest.mark.parametrize(
    ("spec", "granularity", "count"),
    [
        ("resnet9:width=2", "parameter", 25),
        ("resnet9:width=2", "module", 17),
        ("resnet9:width=2", "model", 1),
        ("resnet18:width=2", "parameter", 62),
        ("resnet18:width=2", "module", 41),
        ("resnet18:width=2", "model", 1),
        ("resnet50:width=2", "module", 107),
        (WIDE, "module", 29),
        (PREACT, "module", 38),
    ],
)
def test_the_number_of_layers(spec, granularity, count):
    assert len(layer_groups(NETS[spec], granularity)) == count


@pytest.mark.parametrize("spec", BLOCKS)
def test_blocks_are_residual_blocks(spec):
    assert list(layer_groups(NETS[spec], "block")) == BLOCKS[spec]


def test_a_wrapped_network_has_the_blocks_of_its_network():
    assert list(layer_groups(NETS["wrapped"], "block")) == [
        f"1.{name}" for name in BLOCKS["resnet18:width=2"]
    ]


def test_a_pattern_groups_by_the_text_it_matches():
    groups = layer_groups(NETS["resnet18:width=2"], r"re:layer(\d)")
    assert [name for name in groups if name.isdigit()] == ["1", "2", "3", "4"]
    assert all(name.startswith("layer3.") for name in groups["3"])
    assert groups["conv1.weight"] == ["conv1.weight"]


@pytest.mark.parametrize(
    ("granularity", "text"),
    [
        ("layers", 'got "layers", expected one of parameter, module, block, model'),
        ("re:(", "pattern"),
        ("re:nothing", "matches no parameter; their names are prep.0.weight"),
        ("", "expected one of"),
    ],
)
def test_other_granularities_are_refused(granularity, text):
    with pytest.raises(RequestError) as caught:
        layer_groups(NETS["resnet9:width=2"], granularity)
    assert text in str(caught.value)
