"""Code in the current folder that a command names."""

import pytest
import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data
from robustsoup.data.transforms import ImageTransform
from robustsoup.errors import RequestError
from robustsoup.evaluation.attackers import make_attacker
from robustsoup.settings import AttackSettings
from robustsoup.soups.grid import candidates
from robustsoup.soups.merging import merge
from robustsoup.soups.mixing import check_buffer_policy
from robustsoup.threats import CLEAN
from robustsoup.training.objectives import Objective
from robustsoup.user_code import import_named_module


@pytest.mark.parametrize(
    ("module", "code", "text"),
    [
        ("here_a", "def load(:", 'module "here_a" cannot be imported: SyntaxError'),
        ("here_b", "import no_such_library", 'module "no_such_library" cannot be found'),
    ],
)
def test_the_cause_of_a_failing_import_is_named(tmp_path, monkeypatch, module, code, text):
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=text):
        import_named_module(f"{module}:load")


@pytest.mark.parametrize("spec", [None, "resnet9", "no_such_module:load", "timm:resnet18", ":x"])
def test_other_names_are_left_to_the_code_that_uses_them(spec):
    import_named_module(spec)


def takes_nothing():
    """Take no argument, as no function that robustsoup calls does."""


def merge_wrongly():
    item = Checkpoint({"weight": torch.ones(2)}, {"parameters": ["weight"]})
    return merge([item], takes_nothing)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: load_data(takes_nothing), "(request)"),
        (lambda: Objective.parse(takes_nothing), "(clean, attacked, y)"),
        (lambda: ImageTransform.parse(takes_nothing), "(image)"),
        (merge_wrongly, "(merge)"),
        (lambda: candidates(takes_nothing, 2), "(n, step, max_soups)"),
        (lambda: check_buffer_policy(f"{__name__}:takes_nothing", None, CLEAN), "(soup)"),
        (
            lambda: make_attacker(
                AttackSettings(attack=takes_nothing), (), 2, torch.device("cpu"), (1, 8, 8)
            ),
            "(model, x, y, threat, seed=)",
        ),
    ],
)
def test_a_function_that_takes_other_arguments_is_refused_in_one_line(call, expected):
    with pytest.raises(RequestError) as error:
        call()
    assert str(error.value).endswith(f'takes_nothing": takes (), expected {expected}')
