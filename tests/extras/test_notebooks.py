"""The notebooks of the examples run from top to bottom, and editors complete what they use."""

import json
from pathlib import Path

import pytest

import robustsoup as rs

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def test_there_is_one_notebook_for_each_user():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"choose_a_soup", "run_a_recipe", "use_the_functions"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("ROBUSTSOUP_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    printed = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "Traceback" not in printed
    assert "robustsoup: " not in printed, printed
    assert "text/html" in printed


def complete(code):
    """Return the names that an editor offers at the end of the code."""
    import jedi

    return {completion.name for completion in jedi.Script(code).complete()}


def test_an_editor_completes_public_names_and_what_they_return():
    assert set(rs.__all__) <= complete("import robustsoup as rs\nrs.")
    for call, names in {
        'rs.load_data("digits")': {"train", "val", "test"},
        "rs.Checkpoint.load('a.pth')": {"tensors", "provenance", "digest", "save"},
        "rs.mix([], [])": {"tensors", "save"},
        "rs.train(None, None)": {"tensors", "save"},
        "rs.learn([], None)": {"alpha", "layers"},
        "rs.evaluate(None, None)": {"accuracy", "threats", "warnings"},
        "rs.compare(None, None)": {"rows", "n", "notes"},
    }.items():
        assert names <= complete(f"import robustsoup as rs\n{call}."), call


def test_an_editor_shows_the_arguments_of_the_functions():
    import jedi

    for name in ("apgd", "check", "evaluate", "learn", "mix", "search", "train"):
        code = f"import robustsoup as rs\nrs.{name}("
        (signature,) = jedi.Script(code).get_signatures()
        assert len(signature.params) > 3, name
