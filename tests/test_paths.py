"""A path that starts with "~" lies in the home folder, whoever reads it."""

import pytest
import torch
from command_line import RECIPE
from small_data import write_images

import robustsoup as rs
from robustsoup.data import data_root
from robustsoup.errors import RequestError
from robustsoup.paths import expand_home, user_path
from robustsoup.recipes import load_recipe
from robustsoup.runs.store import Store
from robustsoup.soups.coefficients import load_coefficients


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert not list((tmp_path / "work").iterdir()), "something was written outside of the home"


def test_only_the_start_of_a_path_is_expanded(home):
    assert user_path("~/a") == home / "a"
    assert expand_home("~") == str(home)
    for text in ("a/~/b", "a~", "", "~nobody-of-this-name/a", "s3://~/a"):
        assert expand_home(text) == text


def test_python_functions_write_and_read_in_the_home_folder(home):
    network = rs.load_model("resnet9:width=2", channels=1)
    data = rs.load_data("digits")
    path = rs.Checkpoint.of(network).save("~/net.safetensors")
    assert path == home / "net.safetensors"
    evaluation = rs.evaluate("~/net.safetensors", data.test, samples=4, state_path="~/state.pt")
    assert evaluation.save("~/verdicts.json") == home / "verdicts.json"
    assert torch.equal(rs.Evaluation.load("~/verdicts.json").ids, evaluation.ids)
    soup = rs.mix(["~/net.safetensors", "~/net.safetensors"], [0.5, 0.5])
    assert soup.save("~/soup.pth") == home / "soup.pth"
    alpha = rs.Coefficients.of([0.5, 0.5])
    assert alpha.save("~/alpha.safetensors") == home / "alpha.safetensors"
    assert torch.equal(rs.Coefficients.load("~/alpha.safetensors").alpha, alpha.alpha)
    assert data_root("~/data") == home / "data"
    assert Store("~/store").root == home / "store"


@pytest.mark.parametrize("name", ["ROBUSTSOUP_DATA", "ROBUSTSOUP_STORE"])
def test_environment_variables_may_start_with_the_home_folder(home, monkeypatch, name):
    monkeypatch.setenv(name, "~/there")
    found = data_root() if name == "ROBUSTSOUP_DATA" else Store().root
    assert found == home / "there"


def test_a_folder_of_images_in_the_home_folder(home):
    for name in ("a", "b"):
        write_images(home / "images" / name, 5)
    assert len(rs.load_data("folder:~/images").test) == 2


def test_the_paths_of_a_recipe_may_start_with_the_home_folder(home):
    text = RECIPE.replace('"low', '"~/low').replace('data = "digits"', 'data = "folder:~/images"')
    (home / "two.toml").write_text(text)
    recipe = load_recipe("~/two.toml")
    assert recipe.data == f"folder:{home / 'images'}"
    assert recipe.ingredients["low"].checkpoint == str(home / "low.safetensors")
    assert recipe.ingredients["high"].checkpoint == str(home / "high.safetensors")


def test_a_path_with_a_nul_is_refused_in_one_line():
    with pytest.raises(RequestError, match="without NUL characters") as caught:
        user_path("a\0b.safetensors")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ["~/a\0b.safetensors", "a\0b.pth"])
def test_readers_refuse_a_path_with_a_nul(path):
    with pytest.raises(RequestError, match="without NUL characters"):
        rs.Checkpoint.load(path)
    with pytest.raises(RequestError, match="without NUL characters"):
        load_coefficients(path)
