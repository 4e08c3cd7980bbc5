"""Natural shift: accuracy on corrupted copies of the test set."""

import contextlib

import numpy
import pytest
import torch
from corruptions import write_corruptions
from ingredients import perturbed
from soup_candidates import candidate

import robustsoup as rs
from robustsoup.data.corruptions import open_corruptions
from robustsoup.errors import DataError, RequestError
from robustsoup.evaluation.shift import round_shares
from robustsoup.soups.confirmation import take_part


@pytest.fixture
def folder(tmp_path):
    return write_corruptions(tmp_path / "digits-c")


@pytest.fixture
def network():
    return rs.load_model("resnet9:width=2", channels=1).eval()


@pytest.mark.parametrize("samples", [None, 60])
def test_each_severity_is_judged_on_the_samples_of_the_evaluation(folder, network, samples):
    data = rs.load_data("digits").test
    evaluation = rs.evaluate(network, data, samples=samples, shift=folder)
    plain = rs.evaluate(network, data, samples=samples)
    shift, clean = evaluation.record["shift"], plain.accuracy["clean"]
    with torch.no_grad():
        answer = int(network(torch.zeros(1, 1, 8, 8)).argmax())
    black = float((data.first(samples).labels == answer).float().mean())
    assert shift["corruptions"]["none"] == pytest.approx([clean.value] * 5)
    assert shift["corruptions"]["black"] == pytest.approx([clean.value] * 2 + [black] * 3)
    mean = (7 * clean.value + 3 * black) / 10
    assert abs(evaluation.accuracy["shift"].value - mean) <= 0.5 / clean.n
    assert evaluation.accuracy["shift"].n == clean.n == shift["samples"]
    assert "shift" not in plain.accuracy
    assert torch.equal(evaluation.prediction, plain.prediction)


def test_the_record_keeps_the_shift(folder, network, tmp_path):
    data = rs.load_data("digits").test
    evaluation = rs.evaluate(network, data, samples=20, shift=folder)
    path = evaluation.save(tmp_path / "verdicts.json")
    assert rs.Evaluation.load(path).record["shift"] == evaluation.record["shift"]


def test_the_two_parts_share_no_image(folder, network):
    data = rs.load_data("digits").test
    like = data.first(60)
    splits = {
        part: dict(open_corruptions(folder, like, part).splits(like))["none"]
        for part in ("all", "select", "report")
    }
    assert {part: len(split) for part, split in splits.items()} == dict.fromkeys(splits, 300)
    image = {part: set((split.ids % len(data)).tolist()) for part, split in splits.items()}
    assert not image["select"] & image["report"]
    assert image["all"] == set(range(60))
    for split in splits.values():
        rows = split.ids % len(data)
        assert torch.equal(split.images, data.images[rows])
        assert torch.equal(split.labels, data.labels[rows])


@pytest.mark.parametrize("samples", [3, 4, 5, 60])
def test_images_that_confirm_did_not_steer_the_search(folder, samples):
    like = rs.load_data("digits").val.first(samples)
    parts = {
        "select": like,
        "search": take_part(like, "search", seed=0),
        "confirm": take_part(like, "confirm", seed=0),
    }
    images = {
        part: set(open_corruptions(folder, like, part).rows[: len(split)].tolist())
        for part, split in parts.items()
    }
    assert len(images["confirm"]) == samples // 3
    assert not images["search"] & images["confirm"]
    assert images["search"] | images["confirm"] == images["select"]


def test_a_search_confirms_finalists_on_copies_of_other_images(folder, monkeypatch):
    parts = []

    def evaluate_and_note(network, data, *arguments, **options):
        evaluation = rs.evaluate(network, data, *arguments, **options)
        parts.append((options["shift_part"], len(data), evaluation.record["shift"]["samples"]))
        return evaluation

    monkeypatch.setattr("robustsoup.soups.soup_evaluator.evaluate", evaluate_and_note)
    data = rs.load_data("digits")
    model = rs.load_model("resnet9:width=2", channels=1)
    items = [perturbed(model, seed, 0.01) for seed in (1, 2)]
    goal = {"require": ["Linf 1/255>=0.001", "shift>=0"], "maximise": "shift"}
    limits = {"step": 1, "samples": 10, "steps": 1, "screen": True, "masking_check": False}
    result = rs.search(items, data.val, ["Linf 1/255"], shift=folder, **goal, **limits)
    assert set(parts) == {("search", 7, 7), ("select", 10, 10), ("confirm", 3, 3)}
    assert "corrupted copies" not in " ".join(result.answer.guarantee.leaves_out)
    result = rs.search(items, data.test, ["Linf 1/255"], shift=folder, **goal, **limits)
    assert (
        "corrupted copies of images of test steered the search"
        in result.answer.guarantee.leaves_out
    )


def test_a_later_evaluation_of_the_same_network_reuses_the_shift(folder, network):
    data, seen = rs.load_data("digits").test, []
    first = rs.evaluate(network, data, ["Linf 8/255"], samples=20, steps=1, shift=folder)
    threats = ["Linf 8/255"]
    same = {"samples": 20, "steps": 1, "after": first, "shift": folder}
    again = rs.evaluate(network, data, threats, **same, on_progress=lambda *a: seen.append(a))
    assert again.record["shift"] == first.record["shift"]
    assert seen[-1][0] < seen[-1][1]  # no corrupted copy was evaluated
    other = rs.evaluate(network, data, threats, **same, shift_part="report")
    assert other.record["shift"]["part"] == "report"


def test_progress_counts_the_corrupted_copies(folder, network):
    seen = []
    rs.evaluate(
        network,
        rs.load_data("digits").test,
        samples=20,
        shift=folder,
        on_progress=lambda done, total, figures: seen.append((done, total)),
    )
    assert [total for _, total in seen] == [20 + 2 * 5 * 20] * len(seen)
    assert [done for done, _ in seen] == [20, 120, 220]


def test_shift_is_a_measure_to_require_and_to_maximise(folder):
    data = rs.load_data("digits")
    model = rs.load_model("resnet9:width=2", channels=1)
    items = [perturbed(model, seed, 0.01) for seed in (1, 2)]
    result = rs.search(
        items, data.val, [], step=0.5, samples=30, shift=folder, report_on=data.test.first(40)
    )
    tried = result.candidates
    assert result.answer.fresh_accuracy["shift"].n == 40
    assert all(c.evaluation.record["shift"]["part"] == "select" for c in tried)
    best = rs.select(tried, maximise="shift", require=["shift>=0", "clean>=0"], point=True)
    assert best.met
    assert best.best.evaluation.accuracy["shift"].value == max(
        c.evaluation.accuracy["shift"].value for c in tried
    )
    assert not rs.select(tried, maximise="clean", require=["shift>=1"]).met
    assert rs.select(tried, maximise="clean", require=["shift>=0.001"]).judgement.method != "none"
    with pytest.raises(RequestError, match=r'"shift" was not evaluated'):
        rs.select([candidate("a", 10)], maximise="shift")


def write_wrong(folder, name, array):
    numpy.save(folder / f"{name}.npy", array)


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("labels", numpy.zeros(7, int), "got 7 labels of type int64, expected integers for 5 sev"),
        ("labels", numpy.full(2500, 10), "got labels 10..10, expected 0..9"),
        ("labels", numpy.zeros(2500), "got 2500 labels of type float64"),
        (
            "fog",
            numpy.zeros((2500, 1, 8, 8), numpy.uint8),
            "fog.npy: got uint8 (2500, 1, 8, 8)",
        ),
        ("fog", numpy.zeros((5, 8, 8, 1), numpy.uint8), "expected uint8 (2500, 8, 8, 1)"),
        ("fog", numpy.zeros((2500, 8, 8, 1)), "fog.npy: got float64"),
        ("fog", numpy.array([{}], object), "fog.npy: not a readable .npy file"),
    ],
)
def test_other_files_are_refused_before_any_work(folder, network, name, array, text):
    write_wrong(folder, name, array)
    with pytest.raises(DataError) as caught:
        rs.evaluate(network, rs.load_data("digits").test, samples=4, shift=folder)
    assert text in str(caught.value)


def test_a_folder_without_corruptions_is_refused(network, tmp_path):
    with pytest.raises(DataError, match=r"expected labels\.npy and one \.npy file"):
        rs.evaluate(network, rs.load_data("digits").test, samples=4, shift=tmp_path)


def test_a_search_selects_on_as_many_samples_as_there_are_copies(folder):
    data = rs.load_data("digits")
    model = rs.load_model("resnet9:width=2", channels=1)
    items = [perturbed(model, seed, 0.01) for seed in (1, 2)]
    half = (len(data.test) + 1) // 2
    assert half < len(data.val)
    result = rs.search(items, data.val, [], step=1, shift=folder, maximise="shift")
    for item in result.candidates:
        hits = item.evaluation.hits()
        assert {name: len(mask) for name, mask in hits.items()} == {"clean": half, "shift": half}


@pytest.mark.parametrize("copies", [1, 7, 95])
def test_verdicts_of_images_sum_to_the_mean_over_their_copies(copies):
    hits = torch.randint(copies + 1, (400,), generator=torch.manual_seed(copies))
    verdicts = round_shares(hits, copies)
    assert set(verdicts.tolist()) <= {0, 1}
    difference = verdicts.cumsum(0) - hits.double().cumsum(0) / copies
    assert float(difference.abs().max()) <= 0.5
    if copies == 1:
        assert torch.equal(verdicts, hits)


def test_comparing_needs_the_same_copies(folder, network):
    data = rs.load_data("digits").test
    a, b, c = (
        rs.evaluate(network, data, samples=20, shift=folder, shift_part=part)
        for part in ("report", "report", "select")
    )
    assert rs.compare(a, b).rows["shift"].value == 0
    assert "shift" not in rs.compare(a, c).rows


ATTACKED: list[int] = []


def count_attacks(model, x, y, threat, *, seed):
    ATTACKED.append(len(x))
    return x


def test_an_interruption_while_shift_is_measured_keeps_the_attack(folder, network, tmp_path):
    data = rs.load_data("digits").test
    settings = {"samples": 32, "steps": 2, "shift": folder, "state_path": tmp_path / "state.pt"}

    def interrupt(done, total, figures):
        if done > 2 * 32:
            raise KeyboardInterrupt

    for progress in (interrupt, None):
        with pytest.raises(KeyboardInterrupt) if progress else contextlib.nullcontext():
            evaluation = rs.evaluate(
                network, data, ["Linf 0.1"], attack=count_attacks, on_progress=progress, **settings
            )
    assert len(ATTACKED) == 1
    assert "shift" in evaluation.accuracy
    assert not (tmp_path / "state.pt").exists()
