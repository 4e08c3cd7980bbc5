"""Threat models as text: parsed, printed, and refused in one line."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import robustsoup as rs
from robustsoup.attacks.projections import norms
from robustsoup.errors import RequestError, ThreatError
from robustsoup.recipes.reading import load_recipe
from robustsoup.runs.run import prepare_run
from robustsoup.threats import CLEAN, NORMS, ThreatModel

few_examples = settings(max_examples=30, deadline=None)


@few_examples
@given(norm=st.sampled_from(NORMS), eps=st.floats(0, 1e9, exclude_min=True))
def test_text_parses_back_to_the_same_threat_model(norm, eps):
    eps = min(eps, 1.0) if norm == "Linf" else eps
    threat = ThreatModel(norm, eps)
    assert ThreatModel.parse(str(threat)) == threat
    assert ThreatModel.parse(threat) is threat


@few_examples
@given(level=st.integers(1, 255))
def test_linf_is_printed_in_255ths(level):
    assert str(ThreatModel("Linf", level / 255)) == f"Linf {level}/255"
    assert ThreatModel.parse(f"Linf {level}/255") == ThreatModel("Linf", level / 255)


@pytest.mark.parametrize("norm", NORMS)
def test_eps_0_is_clean_in_every_norm(norm):
    clean = ThreatModel(norm, 0.0)
    assert clean.is_clean
    assert str(clean) == "clean"
    assert ThreatModel.parse(f"{norm} 0").is_clean
    assert ThreatModel.parse(str(clean)) == clean


@pytest.mark.parametrize("number", [np.float64, np.float32, int])
def test_numbers_of_other_types_are_printed_so_that_they_parse(number):
    threat = ThreatModel("L2", number(2))
    assert str(threat) == "L2 2.0" or str(threat) == "L2 2"
    assert ThreatModel.parse(str(threat)) == threat


@pytest.mark.parametrize(
    ("text", "threat"),
    [
        ("Linf 8/255", ThreatModel("Linf", 8 / 255)),
        ("linf  8 / 255 ", ThreatModel("Linf", 8 / 255)),
        ("L2 0.5", ThreatModel("L2", 0.5)),
        ("l1 12", ThreatModel("L1", 12.0)),
        ("L1 1e1", ThreatModel("L1", 10.0)),
        ("clean", CLEAN),
        (" clean ", CLEAN),
    ],
)
def test_spellings(text, threat):
    assert ThreatModel.parse(text) == threat


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Linf",
        "8/255",
        "L3 0.5",
        "Linf eight",
        "Linf 8/0",
        "Linf 8/255 now",
        "Linf 8/255/2",
        "Clean 1",
        None,
        5,
        "L2 nan",
        "L2 inf",
    ],
)
def test_an_invalid_text_is_refused_in_one_line(text):
    with pytest.raises(ThreatError) as caught:
        ThreatModel.parse(text)
    message = str(caught.value)
    assert isinstance(caught.value, RequestError)
    assert "\n" not in message
    assert str(text) in message
    assert "Linf 8/255" in message or "expected a finite number of at least 0" in message


@pytest.mark.parametrize("text", ["Linf -8/255", "L2 -0.5", "L1 12/-1"])
def test_eps_below_0_is_refused(text):
    with pytest.raises(ThreatError, match=f'"{text}".*eps: got -.*at least 0'):
        ThreatModel.parse(text)


@pytest.mark.parametrize(
    ("norm", "eps"),
    [("L0", 1.0), ("linf", 1.0), ("L2", -1.0), ("L2", float("nan")), ("L1", float("inf"))],
)
def test_an_invalid_threat_model_cannot_be_created(norm, eps):
    with pytest.raises(ThreatError, match=r"norm: got|eps: got"):
        ThreatModel(norm, eps)


@pytest.mark.parametrize("eps", [2, 8, 16.0, 255])
@pytest.mark.parametrize("form", ["Linf {}", "linf {}", "Linf {}/1"])
def test_linf_above_1_is_refused_with_the_likely_cause(eps, form):
    with pytest.raises(ThreatError, match=rf"did you mean Linf {eps:g}/255\?$"):
        ThreatModel.parse(form.format(eps))
    with pytest.raises(ThreatError, match="at most 1"):
        ThreatModel("Linf", eps)


@pytest.mark.parametrize("eps", [1.0000001, 1.5, 300 / 255])
def test_a_fraction_above_1_is_refused_without_a_guess(eps):
    with pytest.raises(ThreatError, match=r"expected at most 1$"):
        ThreatModel("Linf", eps)


def test_linf_1_is_the_unbounded_attack():
    unbounded = ThreatModel("Linf", 1.0)
    assert ThreatModel.parse("Linf 1") == unbounded == ThreatModel.parse("Linf 255/255")
    unbounded.check_shape((1, 8, 8))


@pytest.mark.parametrize(
    ("shape", "text", "fits"),
    [
        ((3, 32, 32), "L1 12", True),
        ((3, 32, 32), "L1 3071.9", True),
        ((3, 32, 32), "L1 3072", False),
        ((3, 32, 32), "L2 55.42", True),
        ((3, 32, 32), "L2 55.43", False),
        ((3, 32, 32), "L2 128", False),
        ((1, 8, 8), "L2 7.99", True),
        ((1, 8, 8), "L2 8", False),
        ((1, 8, 8), "L1 64", False),
        ((1, 8, 8), "Linf 1", True),
        ((1, 8, 8), "clean", True),
    ],
)
def test_a_ball_that_holds_every_image_is_refused(shape, text, fits):
    threat = ThreatModel.parse(text)
    if fits:
        threat.check_shape(shape)
        return
    with pytest.raises(ThreatError, match=r"holds every image.*expected a radius below.*Linf 1"):
        threat.check_shape(shape)


def far_corners(norm, shape):
    zeros = torch.zeros(1, *shape)
    return float(norms(zeros + 1 - zeros, norm)[0])


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_the_largest_radius_is_the_distance_of_two_corners(norm):
    largest = far_corners(norm, (3, 5, 5))
    ThreatModel(norm, 0.999 * largest).check_shape((3, 5, 5))
    with pytest.raises(ThreatError):
        ThreatModel(norm, 1.001 * largest).check_shape((3, 5, 5))


TOO_LARGE = ["L2 8", "L1 64"]
ACTIVITIES = {
    "evaluate": lambda model, data, threat: rs.evaluate(model, data, [threat], samples=4),
    "train": lambda model, data, threat: rs.train(model, data, threat=threat, epochs=1),
    "learn": lambda model, data, threat: rs.learn(
        [rs.Checkpoint.of(model)] * 2, data, threat=threat, network=model
    ),
    "search": lambda model, data, threat: rs.search(
        [rs.Checkpoint.of(model)] * 2, data, [threat], network=model, allow_leakage=True
    ),
}


@pytest.mark.parametrize("name", ACTIVITIES)
@pytest.mark.parametrize("text", [*TOO_LARGE, "Linf 8"])
def test_every_activity_refuses_a_radius_that_is_too_large(name, text):
    model, data = rs.load_model("resnet9:width=2", channels=1), rs.load_data("digits").val
    with pytest.raises(ThreatError, match=r"holds every image|did you mean Linf 8/255"):
        ACTIVITIES[name](model, data, text)


@pytest.mark.parametrize("text", [*TOO_LARGE, "Linf 8"])
@pytest.mark.parametrize("table", ["evaluate", "finetune", "pretrain"])
def test_a_recipe_refuses_a_radius_that_is_too_large(text, table, tmp_path):
    threats = {"evaluate": "L2 0.5", "finetune": "L2 0.5", "pretrain": "L2 0.5", table: text}
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""name = "x"
data = "digits"
model = "resnet9:width=2"
[pretrain]
threat = "{threats["pretrain"]}"
epochs = 1
lr = 0.1
[finetune]
threat = "{threats["finetune"]}"
epochs = 1
lr = 0.1
[ingredients]
a = {{}}
b = {{ lr = 0.05 }}
[soups.uniform]
method = "uniform"
[evaluate]
threats = ["{threats["evaluate"]}"]
"""
    )
    with pytest.raises(RequestError, match=r"holds every image|did you mean Linf 8/255"):
        prepare_run(load_recipe(path))
