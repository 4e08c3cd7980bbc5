"""The report: one HTML file that needs nothing beside it."""

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from robustsoup.reports.results import (
    BY_LAYER,
    CLEAN,
    ROLES,
    Row,
    accuracy,
    caveats,
    robust_measures,
    samples,
    shown_split,
    two_best,
    with_measures,
)
from robustsoup.reports.style import percent
from robustsoup.reports.tables import Table

CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5f6368; --paper: #fff; --line: #d9dce0; --tint: #f5f6f8;
  --warn: #fff4d6; --warn-line: #c98a00; --bad: #fde7e9; --bad-line: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3a9b0; --paper: #16181b; --line: #3a3f45;
  --tint: #1f2226; --warn: #3b2f0b; --warn-line: #e0ab3a; --bad: #431419; --bad-line: #ff6b7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .6rem; }
.soft, figcaption, small { color: var(--soft); font-size: .9rem; }
.banner { border-left: 5px solid var(--warn-line); background: var(--warn); padding: .7rem 1rem; margin: 1.25rem 0; }
.banner.violated { border-color: var(--bad-line); background: var(--bad); }
figure { margin: 1.25rem 0; break-inside: avoid; }
details { margin: .4rem 0; }
summary { cursor: pointer; font-size: .9rem; }
.plot, .table { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.plot { background: #fff; padding: .5rem; }
.plot img { display: block; width: 100%; min-width: 34rem; height: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.table table { width: 100%; }
th, td { padding: .3rem .65rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { background: var(--tint); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 400; }
td.number { white-space: nowrap; }
td small { font-size: .75rem; }
.facts th { white-space: nowrap; color: var(--soft); padding-left: 0; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; white-space: pre-wrap; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --tint: #f3f3f3;
  --warn: #fff4d6; --warn-line: #c98a00; --bad: #fde7e9; --bad-line: #b00020; }
  body { max-width: none; padding: 0; font-size: 10pt; } .plot, .table { overflow: visible; } .plot img { min-width: 0; }
  .table table { font-size: 7pt; } th, td { padding: .15rem .3rem; } tr { break-inside: avoid; }
  thead { display: table-header-group; } h2 { break-after: avoid; } .banner, thead th { print-color-adjust: exact; } }
"""


def page(
    results: dict[str, Any],
    pictures: Sequence[tuple[str, bytes, str, Sequence[Table]]],
    left_out: Sequence[tuple[str, str]],
) -> str:
    """The whole file. pictures: (name, SVG, caption, tables to fold below it); left_out: (what, the reason in one line)."""
    name = escape(results["name"])
    figures = "".join(_figure(*picture) for picture in pictures) or "<p>No figure was drawn.</p>"
    reasons = "".join(
        f'<p class="soft">Left out: {escape(what)}: {escape(why)}.</p>' for what, why in left_out
    )
    recipe = json.dumps(results.get("recipe"), indent=2, ensure_ascii=False)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: robustsoup report</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{name}</h1><p class="soft">{escape(_subtitle(results))}</p></header>
<main>
{_banner(results)}
<p>{escape(summary(results))}</p>
<h2>Figures</h2>
{figures}{reasons}
<h2>All networks</h2>
{_table(results)}
<h2>How it was measured</h2>
{_facts(_protocol(results))}
<h2>Recipe</h2>
<pre>{escape(recipe)}</pre>
</main>
</body>
</html>
"""


def _subtitle(results: dict[str, Any]) -> str:
    data = (results.get("data") or {}).get("name")
    parts = [results.get("model"), f"on {data}" if data else None, results.get("created")]
    return " · ".join(str(part) for part in parts if part)


def _banner(results: dict[str, Any]) -> str:
    leakage = results.get("leakage") or {}
    status, why = (
        str(leakage.get("status", "unknown")),
        str(leakage.get("why") or "no record of it"),
    )
    found = []
    if said := caveats(results):
        text = f"{' · '.join(said)}: this flatters the numbers of what was selected."
        found.append(("violated", text[0].upper() + text[1:], why if status == "violated" else ""))
    if status not in ("known", "violated"):
        text = "Unknown whether the selection data is fresh." if status == "unknown" else status
        found.append((status, text, why))
    banners = "".join(
        f'<div class="banner {escape(kind)}" role="note"><strong>{escape(text)}</strong> {escape(reason)}</div>'
        for kind, text, reason in found
    )
    fresh = '<p class="soft">No ingredient was trained on the samples that select and report.</p>'
    return banners + fresh * (status == "known")


def summary(results: dict[str, Any]) -> str:
    """The outcome in a few sentences: the most robust and the cleanest network, and the selected soup."""
    protocol, rows = results["protocol"], results["rows"]
    split = shown_split(rows, protocol)
    said = [f"{len(rows)} networks were compared on {samples(rows, split)} {split} samples."]
    cleanest = None
    for measure in robust_measures(results):
        measured = with_measures(rows, split, CLEAN, measure)
        best = two_best(
            measured, measure, select_on=protocol["select_on"], report_on=protocol["report_on"]
        )
        if best:
            said.append(
                f"The most robust at {measure} is {best[1]['name']}: {_measured(best[1], split, measure)}."
            )
            cleanest = (
                cleanest
                or f"The best on clean inputs is {best[0]['name']}: {_measured(best[0], split, measure)}."
            )
    if cleanest:
        said.append(cleanest)
        if split != protocol["select_on"] and any(row.get(protocol["select_on"]) for row in rows):
            said.append(
                f"These were picked on {protocol['select_on']}; the numbers are those on {split}."
            )
    return " ".join([*said, *_selection(results, split)])


def _measured(row: Row, split: str, measure: str) -> str:
    entries = [(name, accuracy(row, split, name)) for name in (measure, CLEAN)]
    return (
        ", ".join(f"{percent(entry['value'])} {name}" for name, entry in entries if entry)
        or "not measured"
    )


def _selection(results: dict[str, Any], split: str) -> list[str]:
    selection, protocol = results.get("selection"), results["protocol"]
    if not selection:
        return ["No soup was selected."]
    required = " and ".join(map(str, selection.get("require") or []))
    wish = f"Asked for the best {selection.get('maximise')}" + (
        f" with {required}" if required else ""
    )
    chosen = next((row for row in results["rows"] if row["name"] == selection.get("chosen")), None)
    if chosen is None:
        return [
            f"{wish}, no soup was chosen on {protocol['select_on']}. {selection.get('message') or ''}".strip()
        ]
    split = protocol["report_on"] if chosen.get(protocol["report_on"]) else split
    numbers = _measured(chosen, split, str(selection.get("maximise")))
    said = [
        f"{wish}, the soup selected on {protocol['select_on']} is {chosen['name']}: {numbers} on {split}."
    ]
    if required:
        how = (
            "by its estimate" if selection.get("point") else "at the lower end of its 95 % interval"
        )
        verdict = f"{'met' if selection.get('met') else 'NOT met'} {how} on {protocol['select_on']}"
        held = selection.get("held_on_test")
        if held is not None and protocol["report_on"] != protocol["select_on"]:
            verdict += f"; on {protocol['report_on']} it {'held' if held else 'did NOT hold'}"
        said.append(f"The requirement was {verdict}.")
    return said + (
        [str(selection["message"])] if selection.get("message") and not selection.get("met") else []
    )


def _figure(name: str, svg: bytes, caption: str, tables: Sequence[Table]) -> str:
    source = base64.b64encode(svg).decode("ascii")
    image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{source}">'
    figure = f'<figure id="{escape(name)}"><div class="plot">{image}</div><figcaption>{escape(caption)}</figcaption></figure>\n'
    return figure + "".join(map(_fold, tables))


def _fold(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.lines[0])
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in ([_cell(value) for value in line.values()] for line in table.lines)
    )
    return (
        f"<details><summary><strong>{escape(table.title)}</strong> {escape(table.summary)}</summary>"
        f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div></details>\n'
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(results: dict[str, Any]) -> str:
    protocol = results["protocol"]
    columns = [
        (split, measure)
        for split in dict.fromkeys((protocol["select_on"], protocol["report_on"]))
        for measure in (CLEAN, *robust_measures(results))
        if any(accuracy(row, split, measure) for row in results["rows"])
    ]
    best = {
        column: max(
            accuracy(row, *column)["value"] for row in results["rows"] if accuracy(row, *column)
        )
        for column in columns
    }
    head = "".join(
        f'<th scope="col">{escape(f"{measure}, {split}")}</th>' for split, measure in columns
    )
    rows = sorted(results["rows"], key=lambda row: (ROLES.index(row["role"]), row["name"]))
    chosen = (results.get("selection") or {}).get("chosen")
    body = "\n".join(_row(row, columns, best, row["name"] == chosen) for row in rows)
    return (
        '<p class="soft">Accuracy in percent with its 95 % Wilson interval; the best of each column is bold.</p>'
        '<div class="table"><table><thead><tr><th scope="col">name</th><th scope="col">role</th>'
        f'<th scope="col">coefficients</th>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _row(
    row: Row, columns: Sequence[tuple[str, str]], best: dict[tuple[str, str], float], chosen: bool
) -> str:
    cells = []
    for column in columns:
        entry = accuracy(row, *column)
        if not entry:
            cells.append("<td>–</td>")
            continue
        value = f"{100 * entry['value']:.1f}"
        value = f"<strong>{value}</strong>" if entry["value"] == best[column] else value
        interval = f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
        cells.append(f'<td class="number">{value} <small>{interval}</small></td>')
    mark = " <strong>(selected)</strong>" if chosen else ""
    return (
        f'<tr><th scope="row">{escape(row["name"])}{mark}</th><td>{escape(row["role"])}</td>'
        f"<td>{escape(_mixed(row))}</td>{''.join(cells)}</tr>"
    )


def _mixed(row: Row) -> str:
    if row.get("coefficients"):
        return " / ".join(f"{weight:.3g}" for weight in row["coefficients"])
    if row["role"] not in BY_LAYER:
        return "–"
    return "by layer" + (f", t = {row['at']:g}" if row.get("at") is not None else "")


def _protocol(results: dict[str, Any]) -> list[tuple[str, str]]:
    protocol, versions, data = (
        results["protocol"],
        results.get("versions") or {},
        results.get("data") or {},
    )
    counts = protocol.get("samples") or {}
    screened = [row["name"] for row in results["rows"] if row.get("screened")]
    seeds = {
        "recipe": (results.get("recipe") or {}).get("seed"),
        "attack": protocol.get("seed"),
        "split": data.get("seed"),
    }
    facts = [
        (
            "attack",
            ", ".join(
                f"{protocol[key]} {word}".strip()
                for key, word in (
                    ("attack", ""),
                    ("loss", "loss"),
                    ("steps", "steps"),
                    ("restarts", "restart(s)"),
                )
                if protocol.get(key) is not None
            ),
        ),
        ("threats", ", ".join(map(str, protocol["threats"]))),
        ("samples", ", ".join(f"{count} {split}" for split, count in counts.items())),
        ("selected on", protocol["select_on"]),
        ("reported on", protocol["report_on"]),
        ("precision", protocol.get("precision")),
        ("searched in", protocol.get("search_precision")),
        (
            "screened",
            f"{', '.join(screened)} ({protocol['select_on']} figures are upper bounds)"
            if screened
            else None,
        ),
        (
            "warnings",
            "; ".join(
                f"{row['name']}: {text}"
                for row in results["rows"]
                for text in row.get("warnings", ())
            ),
        ),
        ("seeds", ", ".join(f"{what} {seed}" for what, seed in seeds.items() if seed is not None)),
        ("data", ", ".join(str(data[key]) for key in ("name", "split_digest") if data.get(key))),
        (
            "versions",
            ", ".join(
                f"{key} {versions[key]}" for key in versions if key not in ("device", "threads")
            ),
        ),
        ("device", versions.get("device")),
        ("threads", versions.get("threads")),
        (
            "seconds",
            f"{results['seconds']:.0f}"
            if isinstance(results.get("seconds"), int | float)
            else None,
        ),
    ]
    return [(what, str(value)) for what, value in facts if value not in (None, "")]


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(what)}</th><td>{escape(value)}</td></tr>'
        for what, value in facts
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'
