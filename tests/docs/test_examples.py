"""The examples in README.md and docs/ work: commands run or parse, Python runs, recipes load."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from command_line import SMALL

from robustsoup.cli import app, main
from robustsoup.recipes import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DONE, ANSWER_IS_NO, FAILED_ON_TEST = 0, 3, 4


def code_blocks(path, language):
    """Return the fenced code blocks of one language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def shell_commands(path, program="robustsoup"):
    """Return the words of every command of a program in the shell blocks of a page."""
    lines = "\n".join(code_blocks(path, "sh")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in commands if words[:1] == [program]]


def run_commands(commands):
    """Run commands in order; accept exit codes 3 and 4, since those answers depend on training."""
    for words in commands:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code in (DONE, ANSWER_IS_NO, FAILED_ON_TEST), words


def page_name(path):
    return str(path.relative_to(ROOT))


WITH_COMMANDS = [page for page in PAGES if shell_commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=page_name)
def test_every_command_on_a_page_parses(page):
    group = typer.main.get_command(app)
    for words in shell_commands(page):
        command = group.commands[words[0]]
        values = command.make_context(words[0], words[1:]).params
        assert values, words


def test_the_readme_and_the_tutorial_are_among_the_pages():
    names = {page_name(page) for page in WITH_COMMANDS}
    assert {"README.md", "docs/tutorial.md", "docs/how-to/choose.md"} <= names


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    "size", [pytest.param({}, id="full", marks=pytest.mark.slow), pytest.param(SMALL, id="small")]
)
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    commands = shell_commands(ROOT / "README.md")
    assert [words[0] for words in commands] == [
        *("train", "train", "train", "check", "search", "learn", "evaluate", "compare")
    ]
    run_commands([[*words, *map(str, size.get(words[0], ()))] for words in commands])
    for written in ("best/soup.safetensors", "learned/soup.safetensors", "results/soup.test.json"):
        assert (tmp_path / written).exists(), written


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_commands_of_the_pages_about_learning_choosing_and_training_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first_trainings = shell_commands(ROOT / "README.md")[:3]
    how_to = ROOT / "docs" / "how-to"
    greedy = [words for words in shell_commands(how_to / "choose.md") if "greedy" in words]
    training = shell_commands(how_to / "train.md")
    mix = [words for words in training if words[0] == "mix" or "--subspace" in words]
    assert greedy
    assert mix
    run_commands([*first_trainings, *shell_commands(how_to / "learn.md"), *greedy, *mix])
    for written in (
        *("blocks/coefficients.csv", "dial/dial.safetensors", "cleaner.safetensors"),
        *("plane/report.html", "greedy/soup.safetensors", "half.safetensors"),
    ):
        assert (tmp_path / written).exists(), written


SMALL_RECIPE = (
    *("data=digits", "model=resnet9:width=2", "soups.grid.step=0.5"),
    *("pretrain.epochs=4", "pretrain.batch_size=32"),
    *("evaluate.steps=2", "evaluate.select_samples=64", "evaluate.report_samples=64"),
)
"""Settings with which the recipe of the tutorial of CIFAR-10 runs in seconds on digits."""


def shrink_command(words):
    """Return a command of the tutorial of CIFAR-10 for digits, few samples and few steps."""
    options = {"--data": "digits", "--samples": "64", "--steps": "2"}
    words = [options.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] in ("plan", "run"):
        words[1] = str(ROOT / words[1])
        words += [word for setting in SMALL_RECIPE for word in ("--set", setting)]
    if words[0] == "evaluate":
        words += ["--samples", "64", "--steps", "2", "--n-queries", "20"]
    return words


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_tutorial_of_cifar10_runs_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "tutorial-cifar10.md"
    commands = shell_commands(page)
    assert [words[0] for words in commands] == [
        *("fetch", "plan", "run", "check", "search", "report", "show", "evaluate")
    ]
    run_commands([shrink_command(words) for words in commands if words[0] != "fetch"])
    for written in ("best/README.md", "best/report.html", "final/soup.test.json"):
        assert (tmp_path / written).exists(), written
    (code,) = code_blocks(page, "python")
    capsys.readouterr()
    exec(compile(code.replace("3, 32, 32", "1, 8, 8"), page.name, "exec"), {})
    assert "torch.Size([4])" in capsys.readouterr().out


PAGES_WITH_PYTHON = [page for page in PAGES if code_blocks(page, "python")]


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=page_name)
def test_python_examples_run(page, tmp_path, monkeypatch, capsys):
    """Run the blocks of a page in order; a block that begins with "# NAME.py" becomes that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    install_entry_points(page, tmp_path)
    names = {"__name__": "example"}
    for code in code_blocks(page, "python"):
        if file_name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / file_name[1]).write_text(code, encoding="utf-8")
            continue
        exec(compile(code, page.name, "exec"), names)
        assert capsys.readouterr().out.strip(), "an example prints its result"


def install_entry_points(page, folder):
    """Write the entry points of the TOML blocks of a page as an installed package has them."""
    blocks = [code for code in code_blocks(page, "toml") if "entry-points" in code]
    if not blocks:
        return
    groups = tomllib.loads("\n".join(blocks))["project"]["entry-points"]
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    metadata = folder / "example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines))


RECIPES = [code for page in PAGES for code in code_blocks(page, "toml") if "name = " in code]


@pytest.mark.parametrize("code", RECIPES)
def test_recipes_on_pages_load(code, tmp_path):
    text = code.replace('"recipes/', f'"{ROOT.as_posix()}/recipes/')
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml").name


def test_pages_name_recipes_and_make_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{page_name(page)}: make {target}"
        for name in re.findall(r"(?:recipes|examples|benchmarks)/[\w/]+\.(?:toml|py|sh)", text):
            places = (ROOT / name, ROOT / "src" / "robustsoup" / name)
            assert any(place.is_file() for place in places), f"{page_name(page)}: {name}"


def test_the_architecture_page_names_modules_that_exist():
    page = ROOT / "docs" / "architecture.md"
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"`(?:robustsoup/)?((?:\w+/)?\w+\.py)`", text)
    assert len(names) > 10
    for name in names:
        place = ROOT if name.startswith("tests/") else ROOT / "src" / "robustsoup"
        assert (place / name).is_file(), name


def github_anchor(heading):
    """Return the anchor that GitHub and MyST give a heading."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading.strip().lower()))
    return text.replace(" ", "-")


def test_relative_links_lead_to_files_and_headings():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if "generated" in path.parts:
                continue
            assert path.exists(), f"{page_name(page)}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(github_anchor, headings), f"{page_name(page)}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
