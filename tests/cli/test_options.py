"""Options derive from settings classes."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from robustsoup.cli import app
from robustsoup.cli.options import Fields, Given, expand
from robustsoup.errors import RequestError
from robustsoup.settings import (
    AttackSettings,
    EarlyStop,
    LearnSettings,
    TrainSettings,
    check_ranges,
    rules,
    setting,
)
from robustsoup.threats import ThreatModel


@dataclass(frozen=True, kw_only=True)
class BakeSettings:
    degrees: int = setting(180, "Temperature.", ge=50, lt=300)
    fan: bool = setting(False, "Use the fan.")
    timer: bool = setting(True, "Stop in time.")
    rack: str = setting("middle", "Rack.", choices=("top", "middle"))
    early_stop: EarlyStop | None = setting(None, "Stop early.")
    guests: tuple[str, ...] = setting((), "Guest; repeatable.")
    seed: int = setting(0, "Seed.", ge=0)

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class OvenOptions:
    seed: int = setting(0, "Seed of the oven.", ge=0)


def call(command, *words):
    """Run one expanded command with words; return the parsed arguments of its only call."""
    application = typer.Typer()
    application.command()(expand(command))
    result = CliRunner().invoke(application, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def bake(*words, fields=None, wants_given=False):
    """Return the settings (and the given options) that a command receives."""
    received = {}
    shown = fields or Fields()

    def command(settings: Annotated[BakeSettings, shown], oven: OvenOptions, given: Given) -> None:
        """Bake."""
        received.update(settings=settings, oven=oven, given=given)

    call(command, *words)
    return received


def test_no_words_give_the_defaults():
    received = bake()
    assert received["settings"] == BakeSettings()
    assert received["given"] == frozenset()


def test_every_kind_of_field_is_parsed():
    words = ("--degrees", 90, "--fan", "--no-timer", "--rack", "top", "--early-stop")
    received = bake(*words, "--guests", "a", "--guests", "b")
    assert received["settings"] == BakeSettings(
        degrees=90, fan=True, timer=False, rack="top", early_stop=EarlyStop(), guests=("a", "b")
    )
    assert received["given"] == {"degrees", "fan", "timer", "rack", "early_stop", "guests"}


def test_fields_of_one_name_share_an_option():
    received = bake("--seed", 3)
    assert received["settings"].seed == received["oven"].seed == 3


def test_names_defaults_and_selection_can_differ():
    fields = Fields(only=("degrees", "rack"), names={"degrees": "heat"}, defaults={"rack": "top"})
    settings = bake("--heat", 100, fields=fields)["settings"]
    assert settings == BakeSettings(degrees=100, rack="top")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--degrees", 20), "--degrees: got 20, expected a number in [50, 300)"),
        (("--rack", "low"), '--rack: got "low", expected one of top, middle'),
    ],
)
def test_errors_name_the_option(words, message):
    with pytest.raises(RequestError) as error:
        bake(*words)
    assert str(error.value) == message
    with pytest.raises(RequestError, match="--heat: got 20"):
        bake("--heat", 20, fields=Fields(names={"degrees": "heat"}))


def test_an_unset_default_leaves_the_choice_to_the_command():
    fields = Fields(defaults={"degrees": None})
    assert bake(fields=fields)["settings"] == BakeSettings()
    assert bake("--degrees", 60, fields=fields)["settings"].degrees == 60


def parameters_of(name):
    command = typer.main.get_command(app).commands[name]
    return {parameter.name: parameter for parameter in command.params}


@pytest.mark.parametrize(
    ("command", "settings", "omitted", "names"),
    [
        ("train", TrainSettings, {"also"}, {}),  # --threat, repeated
        ("learn", LearnSettings, {"also"}, {"buffers": "learning_buffers"}),
        ("evaluate", AttackSettings, {"targets"}, {}),
    ],
)
def test_commands_show_every_setting(command, settings, omitted, names):
    shown = parameters_of(command)
    for name, rule in rules(settings).items():
        if name not in omitted:
            option = shown[names.get(name, name)]
            assert name in ("lr", "seed", "threat") or option.help.startswith(rule.help)


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("train", {"data", "threat", "output"}),
        ("learn", {"checkpoints", "data", "threat", "output"}),
        ("search", {"checkpoints", "data", "threat", "output"}),
        ("evaluate", {"checkpoints", "data"}),
        ("landscape", {"first", "second", "third", "data", "threat", "output"}),
        ("mix", {"checkpoints", "output"}),
        ("check", {"checkpoints"}),
    ],
)
def test_the_required_options_are_these(command, required):
    shown = parameters_of(command)
    assert {name for name, parameter in shown.items() if parameter.required} == required


def test_ranges_and_choices_are_in_the_help():
    shown = parameters_of("train")
    assert shown["epochs"].help.endswith("At least 1.")
    assert shown["momentum"].help.endswith("In [0, 1).")
    assert shown["lr"].help.endswith("Above 0.")
    assert shown["precision"].help.endswith("One of auto, float32, bfloat16.")


def test_settings_reach_the_command_as_typed_objects():
    received = []

    def command(settings: Annotated[TrainSettings, Fields(required=("threat",))]) -> None:
        """Train."""
        received.append(settings)

    call(command, "--threat", "L2 0.5", "--epochs", 3)
    assert received == [TrainSettings(threat=ThreatModel("L2", 0.5), epochs=3)]
    assert "threat" in inspect.signature(expand(command)).parameters
