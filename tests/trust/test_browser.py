"""A report and cards whose names are hostile, in a real browser: no script runs, nothing is loaded.

Skipped where no Chromium is found. The browser's requests go to a proxy that notes and refuses
them.
"""

import contextlib
import http.server
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from synthetic_results import add_dial_and_greedy, make_results, write_and_read_report

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.reports.card import Card, render_card
from robustsoup.runs.description import Ancestor, StoredEvaluation

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="requires Chromium")
HOST = "hostile.invalid"
MARK = "document.documentElement.setAttribute('data-ran','1')"
CALL = f"{MARK};fetch('http://{HOST}/f');new Image().src='http://{HOST}/i'"
PAYLOADS = (
    f"<script>{CALL}</script>",
    f"</script><script>{CALL}</script>",
    f"</style><script>{CALL}</script><style>",
    f'</title></head><body onload="{CALL}"><script>{CALL}</script>',
    f'<img src="http://{HOST}/img" onerror="{CALL}">',
    f'"><img src=x onerror="{CALL}">',
    f'\'><svg onload="{CALL}">',
    f'" onmouseover="{CALL}" onfocus="{CALL}" autofocus tabindex=1 x="',
    f"<iframe srcdoc=\"<script>parent.{MARK}</script>\" src='http://{HOST}/frame'></iframe>",
    f'<link rel="stylesheet" href="http://{HOST}/css">',
    f'<meta http-equiv="refresh" content="0;url=http://{HOST}/refresh">',
    f'<object data="http://{HOST}/object"></object><embed src="http://{HOST}/embed">',
    f"<svg><image href='http://{HOST}/svg'/><script>{CALL}</script></svg>",
    f"<style>@import url(http://{HOST}/import); body{{background:url(http://{HOST}/bg)}}</style>",
    f'<details open ontoggle="{CALL}"><video src=x onerror="{CALL}"></video></details>',
    f"{{{{ ''.__class__ }}}}{{% include '/etc/passwd' %}}<b>{CALL}</b>",
    f"<math><mtext></p><script>{CALL}</script>",
    f"<!--><script>{CALL}</script>-->",
    f"<noscript><p title=\"</noscript><img src=x onerror='{CALL}'>\">",
)
"""Names that would run a script or load something if a page did not escape them."""


class Proxy(http.server.BaseHTTPRequestHandler):
    """Notes each request and refuses it."""

    seen = None

    def do_GET(self):
        """Note the request."""
        self.seen.append(self.path)
        self.send_error(403)

    do_CONNECT = do_POST = do_HEAD = do_OPTIONS = do_GET  # noqa: N815  # names of the base class

    def log_message(self, *arguments):
        """Print nothing."""


@contextlib.contextmanager
def proxy():
    """Yield the port of a proxy and the list of addresses that it was asked for."""
    seen = []
    handler = type("Noting", (Proxy,), {"seen": seen})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def open_page(path, profile):
    """Open a page; return whether a script ran, and the addresses that the page asked for."""
    with proxy() as (port, seen):
        process = subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                f"--proxy-server=http://127.0.0.1:{port}",
                "--proxy-bypass-list=<-loopback>",
                "--virtual-time-budget=3000",
                "--dump-dom",
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert "</html>" in process.stdout, process.stderr[-500:]
    ran = re.search(r"<html[^>]*data-ran", process.stdout) is not None
    return ran, [address for address in seen if HOST in address]


def put_everywhere(results, name):
    """Put a hostile name into every text of some results that a report shows."""
    changed = {row["name"]: f"{row['name']} {name}" for row in results["rows"]}
    for row in results["rows"]:
        row["name"] = changed[row["name"]]
        row["warnings"] = [name]
        row["soup"] = row.get("soup") and f"{row['soup']}{name}"
        if row.get("ingredients"):
            row["ingredients"] = [f"{part} {name}" for part in row["ingredients"]]
    results["selection"] |= {"chosen": changed[results["selection"]["chosen"]], "message": name}
    results["name"] = results["model"] = results["created"] = name
    results["data"] |= {"name": name, "split_digest": name}
    results["versions"] |= {"torch": name, "device": name, name: name}
    results["leakage"] = {"status": "violated", "why": name}
    results["recipe"] = {"name": name, name: [name]}
    results["protocol"] |= {"attack": name, "loss": name}
    return results


def make_card(name):
    """Make a card whose every text is a hostile name."""
    parent = Ancestor(name, "1" * 64, 0.5, name)
    tree = Ancestor(name, "0" * 64, None, name, (parent, parent))
    stored = StoredEvaluation(
        Path("a.json"), name, name, name, {name: Accuracy(1, 2)}, (name,), (name,)
    )
    return Card(name, name, name, tree, (stored,), (name,), warnings=(name,), sources=(name,))


@needs_browser
def test_the_browser_runs_scripts_and_asks_the_proxy(tmp_path):
    """Without this the other test could not fail."""
    page = tmp_path / "page.html"
    page.write_text(f"<html><body>{PAYLOADS[0]}{PAYLOADS[4]}</body></html>", encoding="utf-8")
    ran, asked = open_page(page, tmp_path / "profile")
    assert ran
    assert asked


def count_page(tally, page, profile, payload):
    """Open a page that holds a payload, and count what it ran or asked for."""
    ran, asked = open_page(page, profile)
    tally.count()
    if ran:
        tally.lost.append(f"a script ran: {payload}")
    if asked:
        tally.silent.append(f"asked for {asked}: {payload}")


@needs_browser
def test_hostile_names_run_no_script_and_load_nothing(tmp_path, tally_of):
    tally = tally_of("hostile names in a report, in Chromium")
    for number, payload in enumerate((*PAYLOADS, " ".join(PAYLOADS))):
        folder = tmp_path / str(number)
        folder.mkdir()
        results = make_results(folder)
        add_dial_and_greedy(folder, results)
        results["figures"] = ["tradeoff", "coefficients"] if number % 6 == 0 else []
        write_and_read_report(folder, put_everywhere(results, payload))
        count_page(tally, folder / "report.html", tmp_path / "profile", payload)
    tally.check()


@needs_browser
def test_hostile_names_in_a_card_are_only_text(tmp_path, tally_of):
    """Render cards by a renderer that passes HTML on, as the strictest test of the escapes."""
    tally = tally_of("hostile names in a card, in Chromium")
    render = MarkdownIt("commonmark", {"html": True}).enable("table").render
    page = tmp_path / "card.html"
    for payload in (*PAYLOADS, " ".join(PAYLOADS)):
        body = render_card(make_card(payload))
        page.write_text(f"<html><body>{render(body)}</body></html>", encoding="utf-8")
        count_page(tally, page, tmp_path / "profile", payload)
    tally.check()
