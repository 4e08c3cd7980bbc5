"""A path in an option or argument may start with "~", also where no shell expands it."""

from command_line import run


def test_options_and_arguments_may_start_with_the_home_folder(here, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(here))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    digits = ("--data", "digits", "--samples", 8)
    pair = ("~/low.safetensors", "~/high.safetensors")
    base = ("--buffers", "base", "--base", "~/base.safetensors")
    assert run("mix", *pair, *base, "-o", "~/soup.safetensors") == 0
    assert run("evaluate", "~/soup.safetensors", *digits, "-o", "~/verdicts") == 0
    assert run("compare", *["~/verdicts/soup.test.json"] * 2) == 0
    search = ("search", *pair, *digits, "--threat", "Linf 1/255", "--steps", 1, "--step", 1)
    assert run(*search, "-o", "~/best") == 0
    assert run("report", "~/best") == 0
    assert (here / "best" / "soup.safetensors").exists()
    assert not list((tmp_path / "work").iterdir())
