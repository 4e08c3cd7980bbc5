"""The front of a run on the terminal: a table and a plot of characters."""

from dataclasses import replace

from robustsoup.cli.front import MOST_ROWS, Mark, draw_plot, print_front
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.runs.results import EvaluationProtocol, ResultRow, Results
from robustsoup.soups.answer import Answer

LINF = "Linf 8/255"


def row(name, role, clean, robust, **more):
    scores = {"clean": Accuracy(clean, 100), LINF: Accuracy(robust, 100)}
    return ResultRow(name=name, role=role, val=scores, **more)


def results_of(*rows, maximise=LINF):
    protocol = EvaluationProtocol(select_on="val", report_on="test", threats=(LINF,))
    answer = Answer(chosen=rows[1].name, maximise=maximise)
    return Results(name="a", protocol=protocol, rows=rows, selection=answer)


def test_the_front_is_listed_and_plotted(capsys):
    results = results_of(
        row("eps2", "ingredient", 95, 20),
        row("best", "grid", 85, 45),
        row("inside", "grid", 80, 40),
        row("eps16", "ingredient", 60, 50),
        row("bound", "grid", 99, 99, screened=True),
        row("corner", "grid", 95, 20, ingredient="eps2"),
    )
    print_front(results)
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "3 of 4 networks are on the front, on val" in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == ["eps2", "best", "eps16"]
    assert lines[3].rstrip().endswith("chosen")
    assert "inside" not in output
    assert "bound" not in output  # an upper bound
    assert "corner" not in output  # the first ingredient again
    plot = lines[lines.index(f"{LINF} (%)") :]
    assert sum(line.count("@") for line in plot) == 2  # the mark and the legend
    assert plot[1].startswith("50.0 |x")
    assert plot[15].rstrip().endswith("x")
    assert plot[15].startswith("20.0 |")


def test_a_long_front_is_thinned_but_keeps_its_ends_and_the_choice(capsys):
    rows = [row(f"s{i}", "grid", 90 - i, 10 + i) for i in range(40)]
    print_front(results_of(*rows))
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[2:] if line.strip().startswith("s")]
    assert len(names) <= MOST_ROWS + 1
    assert {"s0", "s1", "s39"} <= set(names)


def test_a_choice_that_is_an_ingredient_is_marked_there(capsys):
    results = results_of(
        row("eps2", "ingredient", 95, 20),
        row("grid-1-0", "grid", 95, 20, ingredient="eps2"),
        row("best", "grid", 85, 45),
        row("eps16", "ingredient", 60, 50),
    )
    print_front(results)
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "3 of 3 networks" in lines[0]
    assert lines[2].split()[0] == "eps2"
    assert lines[2].rstrip().endswith("chosen")
    assert "grid-1-0" not in output


def test_a_corner_with_statistics_of_its_own_is_another_network(capsys):
    results = results_of(
        row("eps2", "ingredient", 90, 20),
        row("grid-1-0", "grid", 95, 20, coefficients=(1.0, 0.0)),
        row("best", "grid", 85, 45),
    )
    print_front(results)
    lines = capsys.readouterr().out.splitlines()
    assert "2 of 3 networks" in lines[0]
    assert lines[2].split()[0] == "grid-1-0"
    assert lines[2].rstrip().endswith("chosen")


def test_the_closest_soup_is_not_called_chosen(capsys):
    results = results_of(*(row(f"s{i}", "grid", 90 - i, 10 + i) for i in range(4)))
    print_front(replace(results, selection=replace(results.selection, met=False)))
    output = capsys.readouterr().out
    assert "@ closest" in output
    assert "chosen" not in output


def test_without_an_attack_or_soups_nothing_is_printed(capsys):
    few = results_of(row("a", "grid", 90, 10), row("b", "grid", 80, 20))
    print_front(few)
    clean = results_of(*(row(str(i), "grid", 90, 10) for i in range(4)), maximise="clean")
    print_front(replace(clean, protocol=replace(clean.protocol, threats=())))
    print_front(results_of(*(row(str(i), "ingredient", 90, 10) for i in range(4))))
    assert capsys.readouterr().out == ""


def test_a_plot_has_the_ends_of_its_axes_also_for_one_point():
    lines = draw_plot([Mark(0.5, 0.25, "@")], x_label="x", y_label="y", width=11, height=3)
    assert lines == [
        "y",
        "25.0 |",
        "     |     @",
        "25.0 |",
        "     +-----------",
        "      50.0 x 50.0",
    ]
