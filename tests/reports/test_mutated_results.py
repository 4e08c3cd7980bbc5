"""A results.json that anybody wrote: the report is drawn, or one line says why not."""

from json_mutations import mutated_texts
from markers import thinned

from robustsoup.errors import RobustsoupError
from robustsoup.reports import StoredRun, collect_parts
from robustsoup.reports.page import render_report
from robustsoup.runs.results import Results


@thinned("seed", [0, 1], one_in=2)
def test_mutated_results_are_rendered_or_refused_in_one_line(tmp_path, all_results, seed):
    path, refusals = tmp_path / "results.json", []
    for text in mutated_texts(all_results, 150, seed):
        path.write_text(text, encoding="utf-8")
        try:
            results = Results.load(path)
            render_report(results, collect_parts(StoredRun(results, tmp_path), [], []))
        except RobustsoupError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all(message.isprintable() for message in refusals)
