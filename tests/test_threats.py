"""Threat models as text: parsed, printed, and refused in one line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.errors import RequestError, ThreatError
from robustsoup.threats import CLEAN, NORMS, ThreatModel

few_examples = settings(max_examples=30, deadline=None)


@few_examples
@given(norm=st.sampled_from(NORMS), eps=st.floats(0, 1e9, exclude_min=True))
def test_text_parses_back_to_the_same_threat_model(norm, eps):
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
