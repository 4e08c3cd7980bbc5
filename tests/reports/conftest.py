import pytest
from matplotlib import rc_context
from synthetic_results import make_all_results, make_results, stored_run

from robustsoup.reports import FIGURES, style

ALL_FORMATS = dict(style.FORMATS)


@pytest.fixture(autouse=True)
def only_svg(monkeypatch):
    """Save figures in the one format that the report needs."""
    monkeypatch.setattr(style, "FORMATS", {"svg": ALL_FORMATS["svg"]})


@pytest.fixture
def small_formats(monkeypatch, only_svg):
    """Save figures in all formats with few pixels."""
    formats = {ending: options | {"dpi": 50} for ending, options in ALL_FORMATS.items()}
    monkeypatch.setattr(style, "FORMATS", formats)


@pytest.fixture
def results(tmp_path):
    return make_results(tmp_path)


@pytest.fixture
def all_results(tmp_path):
    return make_all_results(tmp_path)


@pytest.fixture(scope="session")
def draw_shared(tmp_path_factory):
    """Draw a figure of all results once for all tests, which must not change it."""
    folder = tmp_path_factory.mktemp("all-results")
    run = stored_run(folder, make_all_results(folder))
    plots = {}

    def draw(name):
        if name not in plots:
            with rc_context(style.STYLE):
                (plots[name],), reason = FIGURES[name](run)
            assert reason == ""
        return plots[name]

    return draw
