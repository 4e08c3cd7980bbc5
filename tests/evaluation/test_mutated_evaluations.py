"""The record of an evaluation that anybody wrote: compared, or one line says why not."""

import json

import pytest
from json_mutations import mutated_texts

from robustsoup.cli.tables import print_comparison
from robustsoup.errors import RobustsoupError
from robustsoup.evaluation.comparison import compare
from robustsoup.evaluation.verdicts import Evaluation


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_records_are_compared_or_refused_in_one_line(tmp_path, evaluation, capsys, seed):
    path, refusals = evaluation.save(tmp_path / "evaluation.json"), []
    content = json.loads(path.read_text())
    content.pop("digests", None)  # as if a stranger had written the file
    for text in mutated_texts(content, 200, seed):
        path.write_text(text, encoding="utf-8")
        try:
            comparison = compare(evaluation, Evaluation.load(path))
            print_comparison(comparison, ["a", "b"])
            json.dumps(comparison.to_json())
        except RobustsoupError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all(message.isprintable() for message in refusals)
    assert capsys.readouterr().out.replace("\n", "").isprintable()
