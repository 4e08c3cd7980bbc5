"""Synthetic images: mapped from an .npz file, drawn from all of it, mixed into each batch."""

import hashlib
import os
import zipfile

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markers import needs_cifar10
from trained_seed import trained_seed

import robustsoup.data.synthetic as synthetic_file
from robustsoup.data import Augmentation, Synthetic, batches, load_data, mixed_batches
from robustsoup.data.splits import Split
from robustsoup.errors import CheckpointError, DataError, RequestError
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.training.train import train

DIGITS = load_data("digits")
DATA = DIGITS.train.first(96)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "robustsoup" / "digests"


def arrays(split, n=None):
    """Real images in the form of a synthetic file: sorted by class, channels last."""
    order = split.labels[:n].argsort(stable=True)
    return {
        "image": numpy.ascontiguousarray(split.images[:n][order].permute(0, 2, 3, 1).numpy()),
        "label": split.labels[:n][order].numpy(),
    }


def write_npz(path, **content):
    numpy.savez(path, **content)
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opened synthetic images, sorted by class."""
    return Synthetic.open(
        write_npz(tmp_path_factory.mktemp("made") / "made.npz", **arrays(DIGITS.val))
    )


@pytest.fixture
def npz_file(tmp_path):
    return write_npz(tmp_path / "made.npz", **arrays(DIGITS.val))


def trained(**changed):
    defaults = {
        "threat": "Linf 16/255",
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.1,
        "device": "cpu",
        "precision": "float32",
        "seed": trained_seed(),
    }
    return train(
        load_model("resnet9:width=2", channels=1, seed=trained_seed()), DATA, **(defaults | changed)
    )


# reading


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_the_arrays_of_a_file_are_mapped(tmp_path, dtype):
    content = arrays(DIGITS.val)
    path = write_npz(
        tmp_path / "made.npz",
        label=content["label"].astype(dtype),
        image=content["image"],
        other=numpy.ones(3),
    )
    synthetic = Synthetic.open(path)
    assert isinstance(synthetic.images, numpy.memmap)
    assert isinstance(synthetic.labels, numpy.memmap)
    assert len(synthetic) == len(DIGITS.val)
    assert numpy.array_equal(synthetic.images, content["image"])
    images, labels = synthetic.take(torch.tensor([5, 200, 5]))
    assert (images.dtype, labels.dtype, tuple(images.shape)) == (
        torch.uint8,
        torch.int64,
        (3, 1, 8, 8),
    )
    assert torch.equal(images, torch.from_numpy(content["image"][[5, 200, 5]]).permute(0, 3, 1, 2))
    assert labels.tolist() == content["label"][[5, 200, 5]].tolist()
    synthetic.check_fit(DATA)


def test_members_with_extra_fields_are_mapped(tmp_path):
    """Archives over 4 GB have an extra field before the data; here it is forced."""
    content, path = arrays(DIGITS.val), tmp_path / "big.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in ("image", "label"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                numpy.lib.format.write_array(file, content[name])
    assert numpy.array_equal(Synthetic.open(path).images, content["image"])
    assert numpy.array_equal(Synthetic.open(path).labels, content["label"])


def test_the_digest_covers_the_whole_file_and_is_computed_once(npz_file, cache, monkeypatch):
    seen = []
    monkeypatch.setattr(synthetic_file, "READ_BLOCK_BYTES", 1000)
    digest = Synthetic.open(npz_file, lambda done, total, figures: seen.append(done)).digest
    assert digest == hashlib.sha256(npz_file.read_bytes()).hexdigest()
    assert len(seen) == -(-npz_file.stat().st_size // 1000)
    assert len(list(cache.iterdir())) == 1
    seen.clear()
    assert Synthetic.open(npz_file, lambda done, total, figures: seen.append(done)).digest == digest
    assert not seen
    content = bytearray(npz_file.read_bytes())
    content[2000] ^= 1  # one bit of one image
    npz_file.write_bytes(content)
    os.utime(npz_file, ns=(1, 1))
    assert Synthetic.open(npz_file).digest == hashlib.sha256(content).hexdigest() != digest
    for cached in cache.iterdir():
        cached.write_text("{")
    assert Synthetic.open(npz_file).digest == hashlib.sha256(content).hexdigest()


CONTENT = arrays(DIGITS.val, 40)
WRONG = {
    "no image": ({"label": CONTENT["label"]}, 'no "image" in it; got label'),
    "no label": ({"image": CONTENT["image"]}, 'no "label" in it; got image'),
    "floats": ({**CONTENT, "image": CONTENT["image"] / 255}, "image is float64"),
    "flat": (
        {**CONTENT, "image": CONTENT["image"].reshape(40, -1)},
        r"image is uint8 of shape \(40, 64\)",
    ),
    "one-hot": ({**CONTENT, "label": numpy.eye(10)[CONTENT["label"]]}, "label is float64"),
    "columns": (
        {**CONTENT, "label": CONTENT["label"][:, None]},
        r"label is int64 of shape \(40, 1\)",
    ),
    "fewer labels": ({**CONTENT, "label": CONTENT["label"][:39]}, "40 images and 39 labels"),
    "nothing": ({"image": CONTENT["image"][:0], "label": CONTENT["label"][:0]}, "at least one"),
    "objects": ({**CONTENT, "label": CONTENT["label"].astype(object)}, "Python objects"),
    "Fortran": ({**CONTENT, "image": numpy.asfortranarray(CONTENT["image"])}, "Fortran order"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_error_for_wrong_content_names_the_file(tmp_path, name):
    content, text = WRONG[name]
    path = write_npz(tmp_path / "wrong.npz", **content)
    with pytest.raises(DataError, match=rf"wrong\.npz: .*{text}") as caught:
        Synthetic.open(path)
    assert "\n" not in str(caught.value)


def test_the_error_for_a_file_that_cannot_be_mapped_names_it(tmp_path, npz_file):
    numpy.savez_compressed(tmp_path / "small.npz", **CONTENT)
    with pytest.raises(
        DataError, match=r"small\.npz: compressed.*rewrite it once: python -c .*savez"
    ):
        Synthetic.open(tmp_path / "small.npz")
    (tmp_path / "cut.npz").write_bytes(npz_file.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut\.npz: not a readable \.npz file"):
        Synthetic.open(tmp_path / "cut.npz")
    with pytest.raises(DataError, match="no such file"):
        Synthetic.open(tmp_path / "nowhere.npz")
    with pytest.raises(DataError, match="not a readable"):
        Synthetic.open(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_named(npz_file):
    opened = Synthetic.open(npz_file)
    write_npz(npz_file, **arrays(DIGITS.val, 100))
    with pytest.raises(DataError, match=r"made\.npz: removed or changed after it was opened"):
        opened.take(torch.tensor([0]))
    npz_file.unlink()
    with pytest.raises(DataError, match="removed or changed"):
        opened.take(torch.tensor([0]))


def test_images_of_another_size_and_labels_of_other_classes_do_not_fit(tmp_path):
    wide = write_npz(
        tmp_path / "wide.npz",
        image=numpy.zeros((4, 8, 9, 1), numpy.uint8),
        label=numpy.zeros(4, int),
    )
    with pytest.raises(DataError, match=r"\(8, 9, 1\), expected \(8, 8, 1\) as in digits"):
        trained(synthetic=wide)
    for label in (10, -1):
        path = write_npz(
            tmp_path / f"{label}.npz", image=CONTENT["image"], label=numpy.full(40, label)
        )
        with pytest.raises(DataError, match=rf"got labels {label}\.\.{label}, expected 0\.\.9"):
            trained(synthetic=path)


@pytest.mark.parametrize("fraction", [1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(npz_file, fraction):
    with pytest.raises(RequestError, match=r"synthetic_fraction: got .*\[0, 1\)"):
        trained(synthetic=npz_file, synthetic_fraction=fraction)


# batches


def test_each_batch_of_each_epoch_draws_other_images(opened):
    drawn = [
        ids[ids < 0].tolist()
        for epoch in range(2)
        for _, _, ids in mixed_batches(DIGITS.train.first(64), opened, 0.5, 32, seed=3, epoch=epoch)
    ]
    assert len({tuple(sorted(ids)) for ids in drawn}) == len(drawn) == 4


def test_a_fraction_that_leaves_no_real_image_is_refused(npz_file):
    with pytest.raises(RequestError, match=r"0\.999 of a batch of 32 leaves no real image"):
        trained(synthetic=npz_file, synthetic_fraction=0.999, batch_size=32)


@settings(max_examples=40, deadline=None)
@given(
    fraction=st.floats(0, 0.99),
    batch_size=st.integers(2, 70),
    epoch=st.integers(0, 3),
    skip=st.integers(0, 4),
    n=st.integers(2, 150),
)
def test_each_batch_has_its_share_and_skip_yields_the_rest(
    opened, fraction, batch_size, epoch, skip, n
):
    assume(round(fraction * batch_size) < batch_size)
    data = DIGITS.train.first(n)
    complete_run = list(mixed_batches(data, opened, fraction, batch_size, seed=3, epoch=epoch))
    assert (
        len(complete_run)
        == max(n // batch_size, 1)
        == len(list(batches(data, batch_size, seed=3, epoch=epoch)))
    )
    real = []
    for x, y, ids in complete_run:
        count = round(fraction * batch_size)
        assert int((ids < 0).sum()) == count
        assert len(x) == len(y) == len(ids) == count + min(batch_size - count, n)
        real += ids[ids >= 0].tolist()
        images, labels = opened.take(-1 - ids[ids < 0])
        assert torch.equal(x[ids < 0], images.float() / 255)
        assert torch.equal(y[ids < 0], labels)
    assert len(set(real)) == len(real)  # a real image once an epoch at most
    skipped_run = list(
        mixed_batches(data, opened, fraction, batch_size, seed=3, epoch=epoch, skip=skip)
    )
    assert all(
        torch.equal(a, b)
        for one, two in zip(complete_run[skip:], skipped_run, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_images_are_drawn_from_the_whole_of_a_sorted_file(opened):
    seen = set()
    for epoch in range(3):
        for _, y, ids in mixed_batches(DATA, opened, 0.75, 32, seed=0, epoch=epoch):
            assert len(set(y[ids < 0].tolist())) >= 6  # 24 draws of 10 classes
            seen.update((-1 - ids[ids < 0]).tolist())
    assert min(seen) < 20
    assert max(seen) > len(opened) - 20
    assert {int(opened.labels[row]) for row in seen} == set(range(10))
    first = [ids.tolist() for _, _, ids in mixed_batches(DATA, opened, 0.75, 32, seed=0, epoch=0)]
    other = [ids.tolist() for _, _, ids in mixed_batches(DATA, opened, 0.75, 32, seed=1, epoch=0)]
    assert first != other


def test_real_and_synthetic_images_are_augmented_alike(opened):
    moved = Split(
        DATA.images, DATA.labels, DATA.ids, "train", DATA.record, Augmentation(pad=2, flip=True)
    )
    plain = list(mixed_batches(DATA, opened, 0.5, 32, seed=0, epoch=0))
    for (x, _, ids), (still, _, same) in zip(
        mixed_batches(moved, opened, 0.5, 32, seed=0, epoch=0), plain, strict=True
    ):
        assert torch.equal(ids, same)
        for kind in (ids < 0, ids >= 0):
            changed = (x[kind] != still[kind]).flatten(1).any(1).float().mean()
            assert changed > 0.5


# training


def test_training_uses_and_records_synthetic_images_and_resumes(npz_file, monkeypatch, tmp_path):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    opened = Synthetic.open(npz_file)
    complete_run = trained(synthetic=npz_file)
    assert (
        complete_run.digest
        == trained(synthetic=opened, synthetic_fraction=0.7).digest
        != trained().digest
    )
    assert trained(synthetic=opened, synthetic_fraction=0.0).digest == trained().digest
    assert complete_run.provenance["training"]["synthetic"] == opened.digest
    assert complete_run.provenance["training"]["synthetic_fraction"] == 0.7
    assert complete_run.provenance["synthetic"] == [
        {"file": "made.npz", "digest": opened.digest, "images": len(opened)}
    ]
    assert "synthetic" not in trained().provenance

    def stop(done, total, figures):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(synthetic=npz_file, state_path=tmp_path / "s.pt", on_progress=stop)
    with pytest.raises(CheckpointError, match="other settings"):
        trained(state_path=tmp_path / "s.pt")
    resumed = trained(synthetic=npz_file, state_path=tmp_path / "s.pt")
    assert (resumed.digest, resumed.provenance) == (complete_run.digest, complete_run.provenance)


@needs_cifar10
def test_training_with_a_file_of_cifar10_images(tmp_path):
    data = load_data("cifar10")
    path = write_npz(tmp_path / "cifar.npz", **arrays(data.val, 2000))
    opened = Synthetic.open(path)
    assert opened.images.shape == (2000, 32, 32, 3)
    for x, y, ids in mixed_batches(data.train.first(512), opened, 0.7, 128, seed=0, epoch=0):
        assert (len(x), int((ids < 0).sum())) == (128, 90)
        assert set(y[ids < 0].tolist()) == set(range(10))
    network = load_model("resnet9:width=2", mean=data.record["mean"], std=data.record["std"])
    got = train(
        network,
        data.train.first(256),
        threat="Linf 8/255",
        epochs=1,
        lr=0.1,
        synthetic=path,
        ema=0.9,
        objective="trades 5",
        label_smoothing=0.1,
        schedule="one-cycle",
        device="cpu",
        precision="float32",
    )
    assert got.provenance["training"]["synthetic"] == opened.digest


@pytest.mark.skipif(os.name != "posix", reason="FIFOs are files on POSIX systems")
def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"a\.npz.*got a FIFO, expected a regular file"):
        Synthetic.open(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': " + "(" * 900 + ", }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 2, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 2, 2, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999999999999, 2, 2, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': 5, }",
        "{'descr': [], 'fortran_order': False, 'shape': (1, 2, 2, 3), }",
        "{'descr': '|u1', 'fortran_order': False}",
        "5",
    ],
)
def test_a_header_that_claims_something_else_is_refused(tmp_path, header):
    padded = header + " " * (-(len(header) + 11) % 64) + "\n"
    content = b"\x93NUMPY\1\0" + len(padded).to_bytes(2, "little") + padded.encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", content + bytes(12))
        archive.writestr("label.npy", content + bytes(12))
    with pytest.raises(DataError, match=r"a\.npz: ") as caught:
        Synthetic.open(tmp_path / "a.npz")
    assert str(caught.value).isprintable()
