"""Hit tables: what is written is read, and damage is noticed."""

import numpy as np
import pytest
from soup_candidates import LINF, candidate

from robustsoup.errors import RequestError
from robustsoup.evaluation.hit_tables import HitTable


@pytest.fixture
def table():
    evaluations = {name: candidate(name, clean, robust).evaluation for name, clean, robust in ROWS}
    return HitTable.of(evaluations, [[1, 0], [0.5, 0.5], [0, 1]], {"attack": "apgd", "steps": 10})


ROWS = (("1-0", 190, 40), ("0.5-0.5", 151, 77), ("0-1", 120, 90))


def test_the_table_holds_the_verdicts_of_the_evaluations(table):
    assert table.names == ("1-0", "0.5-0.5", "0-1")
    assert set(table.hits) == {"clean", LINF}
    assert [int(row.sum()) for row in table.hits["clean"]] == [190, 151, 120]
    assert table.row("0.5-0.5")[LINF].sum() == 77


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 200])
def test_a_saved_table_is_read_as_it_was(table, tmp_path, samples):
    part = HitTable(
        table.names,
        table.coefficients,
        table.ids[:samples],
        {measure: hits[:, :samples] for measure, hits in table.hits.items()},
        table.record,
    )
    read = HitTable.load(part.save(tmp_path / "table.npz"))
    assert read.names == part.names
    assert read.record == part.record
    assert np.array_equal(read.coefficients, part.coefficients)
    assert np.array_equal(read.ids, part.ids)
    assert list(read.hits) == list(part.hits)
    assert all(np.array_equal(read.hits[key], part.hits[key]) for key in part.hits)


def test_a_part_has_the_rows_asked_for(table):
    part = table.take([2, 0])
    assert part.names == ("0-1", "1-0")
    assert part.row("0-1")[LINF].sum() == 90


def test_a_changed_table_is_refused(table, tmp_path):
    path = table.save(tmp_path / "table.npz")
    arrays = dict(np.load(path))
    arrays["bits_1"][0, 0] ^= 1
    np.savez(path, **arrays)
    with pytest.raises(RequestError, match=r"table.npz: .*its content is not what its digest says"):
        HitTable.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(RequestError, match=r"not a hit table that robustsoup wrote: no 'digest'"):
        HitTable.load(path)
    with pytest.raises(RequestError, match=r"missing.npz"):
        HitTable.load(tmp_path / "missing.npz")


def test_evaluations_on_other_samples_are_refused():
    first, second = candidate("a", 10, 5).evaluation, candidate("b", 10, 5, 3).evaluation
    with pytest.raises(RequestError, match=r"b: evaluated on other samples or under other threats"):
        HitTable.of({"a": first, "b": second}, [[1, 0], [0, 1]])
