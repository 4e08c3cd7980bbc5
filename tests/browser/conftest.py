"""One headless Chromium of the system, and reports to open in it."""

import shutil

import pytest
from synthetic_results import add_dial_and_greedy, make_all_results, write_and_read_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser():
    """A Chromium; the tests fail without one, as `make test-browser` needs it."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, f"none of {', '.join(NAMES)} is installed: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """The path of a report in which every view has something to show."""
    folder = tmp_path_factory.mktemp("report")
    results = make_all_results(folder)
    add_dial_and_greedy(folder, results)
    results["figures"] = []
    write_and_read_report(folder, results)
    return folder / "report.html"


@pytest.fixture
def open_page(browser):
    """Open a page; afterwards the test fails if the page logged an error or asked the network."""
    contexts, faults = [], []

    def open_path(path, width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:")) else faults.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("#front svg")
        return page

    yield open_path
    for context in contexts:
        context.close()
    assert not faults
