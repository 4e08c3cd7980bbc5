"""Settings and the catalog: ranges, parsing, records and suggestions."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

from robustsoup import catalog
from robustsoup.errors import RequestError
from robustsoup.settings import (
    AttackSettings,
    BufferSettings,
    DialSettings,
    EarlyStop,
    LandscapeSettings,
    LearnSettings,
    SearchSettings,
    TrainSettings,
    accepts_settings,
    make_settings,
    parse_numbers,
    rules,
    to_record,
)
from robustsoup.threats import ThreatModel

ALL = (
    AttackSettings,
    BufferSettings,
    DialSettings,
    EarlyStop,
    LandscapeSettings,
    LearnSettings,
    SearchSettings,
    TrainSettings,
)
REGISTRIES = [value for value in vars(catalog).values() if isinstance(value, catalog.Registry)]


@pytest.mark.parametrize("kind", ALL)
def test_every_default_is_valid_and_every_setting_has_help(kind):
    kind()
    assert all(rule.help.endswith(".") for rule in rules(kind).values())


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainSettings, {"epochs": 0}, "epochs: got 0, expected at least 1"),
        (TrainSettings, {"momentum": 1}, "momentum: got 1, expected a number in [0, 1)"),
        (TrainSettings, {"lr": float("inf")}, "lr: got inf, expected a finite number above 0"),
        (TrainSettings, {"bn_momentum": 0}, "bn_momentum: got 0, expected a number in (0, 1]"),
        (TrainSettings, {"nesterov": True, "momentum": 0}, "nesterov: requires momentum above 0"),
        (TrainSettings, {"precision": "int8"}, 'precision: got "int8", expected one of auto, '),
        (LearnSettings, {"init": "ones"}, 'init: got "ones", expected xavier, zeros or weights'),
        (LearnSettings, {"dial": {"by": "t"}}, 'by: got "t", expected one of objective, eps'),
        (AttackSettings, {"loss": "cw"}, 'loss: got "cw", expected one of ce, dlr, targeted dlr'),
        (SearchSettings, {"step": 0.3}, "step: got 0.3, expected a fraction of 1"),
        (TrainSettings, {"epochs": 2.5}, "epochs: got 2.5, expected a whole number"),
        (TrainSettings, {"epochs": True}, "epochs: got True, expected a whole number"),
        (TrainSettings, {"epochs": None}, "epochs: got None, expected a whole number"),
        (TrainSettings, {"lr": "0.1"}, 'lr: got "0.1", expected a number'),
        (TrainSettings, {"nesterov": "no"}, 'nesterov: got "no", expected true or false'),
        (LearnSettings, {"granularity": 3}, "granularity: got 3, expected text"),
        (TrainSettings, {"eopchs": 3}, 'unknown setting "eopchs"; did you mean "epochs"?'),
    ],
)
def test_bad_values_are_named(kind, values, message):
    with pytest.raises(RequestError) as error:
        make_settings(kind, None, values)
    assert message in str(error.value)


def test_text_is_parsed_once_and_recorded_as_text():
    parsed = TrainSettings(threat="L2 0.5", early_stop={"steps": 3})
    assert parsed.threat == ThreatModel("L2", 0.5)
    assert parsed.early_stop == EarlyStop(steps=3)
    record = to_record(parsed)
    assert record["threat"] == "L2 0.5"
    assert record["early_stop"] == {"steps": 3, "samples": None}
    assert make_settings(TrainSettings, None, record) == parsed


def test_one_requirement_may_be_given_as_text_and_numpy_numbers_are_numbers():
    assert SearchSettings(require="clean>=0.8").require == ("clean>=0.8",)
    assert SearchSettings(maximise=ThreatModel("L2", 0.5)).maximise == "L2 0.5"
    settings = TrainSettings(epochs=np.int64(3), lr=np.float64(0.5))
    assert (settings.epochs, settings.lr) == (3, 0.5)


def test_changes_override_the_settings_they_start_from():
    base = TrainSettings(epochs=3)
    changed = make_settings(TrainSettings, base, {"lr": 0.5})
    assert (changed.epochs, changed.lr, base.lr) == (3, 0.5, 1e-3)


def test_the_signature_lists_the_settings():
    @accepts_settings(DialSettings)
    def turn(x, settings=None, **changes):
        return make_settings(DialSettings, settings, changes)

    assert list(inspect.signature(turn).parameters) == ["x", "settings", "by", "turn_every"]
    assert turn(0, turn_every=2) == DialSettings(turn_every=2)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.name)
def test_every_entry_has_help_and_its_code_can_be_imported(registry):
    for entry in registry.values():
        assert entry.help.endswith(".")
        assert not entry.target or callable(entry.load()) or "library" in entry.facts


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(RequestError, match=r'models: got "resnet8", .*did you mean "resnet'):
        catalog.MODELS.get_entry("resnet8")


def test_settings_and_catalog_do_not_import_torch():
    script = "import sys, robustsoup.settings, robustsoup.catalog; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1/3, 2/3", (1 / 3, 2 / 3)), ("-0.5,1e-3,+2", (-0.5, 0.001, 2.0)), (" 1 ", (1.0,))],
)
def test_numbers_may_be_fractions(text, numbers):
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize(
    "text", ["", "1,", "1/0", "0.5/2", "1/2/3", "nan", "inf", "1e999999999", "8E" + 60 * "8", "x"]
)
def test_what_is_no_finite_number_is_refused_at_once(text):
    with pytest.raises(ValueError, match=r"."):
        parse_numbers(text)
