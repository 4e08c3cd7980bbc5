"""Data sets of the library `datasets`, read from local files; no test uses the network."""

import io
import sys
import warnings

import pytest
import torch
from PIL import Image, ImageOps
from small_data import write_images

from robustsoup.data import load_data
from robustsoup.data.hub import (
    HubSplit,
    describe_splits,
    has_labels,
    match_splits,
    number_classes,
    open_stored_image,
)
from robustsoup.errors import DataError


@pytest.fixture
def datasets(monkeypatch, tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets as library
    from huggingface_hub import constants

    # Both read the environment when they are imported; other tests use a hub on this machine.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    library.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library and its own libraries warn of
        yield library


def encode(shade, mode):
    written = io.BytesIO()
    Image.new(mode, (8, 8), shade if mode == "L" else (shade, shade, shade)).save(written, "png")
    return {"bytes": written.getvalue(), "path": None}


@pytest.mark.parametrize("orientation", [None, *range(10)])
@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_images_are_turned_as_their_orientation_says(orientation, kind):
    pixels = torch.arange(8 * 16, dtype=torch.uint8).view(8, 16).numpy()
    exif, written = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(written, kind, exif=exif)
    with Image.open(io.BytesIO(written.getvalue())) as image:
        image.load()
        expected = ImageOps.exif_transpose(image)
    opened = open_stored_image({"bytes": written.getvalue(), "path": None}, "row 0")
    assert opened.size == expected.size
    assert opened.tobytes() == expected.tobytes()
    assert opened.format == kind.upper()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # of Pillow, when it opens the file
def test_a_broken_exif_block_turns_nothing():
    written = io.BytesIO()
    Image.new("L", (4, 8)).save(written, "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffbroken")
    assert open_stored_image({"bytes": written.getvalue()}, "row 0").size == (4, 8)


def make_dataset(datasets, count, labels=None, mode="RGB", classes=("cat", "dog")):
    """Make a data set whose image n has the shade n and the label n % 2."""
    labels = [number % 2 for number in range(count)] if labels is None else labels
    names = datasets.ClassLabel(names=list(classes))
    kind = datasets.Value("string") if isinstance(labels[0], str) else names
    images = [encode(number, mode) for number in range(count)]
    features = {"id": datasets.Value("int64"), "img": datasets.Image(), "label": kind}
    return from_columns(datasets, features, id=list(range(count)), img=images, label=labels)


def from_columns(datasets, features, **columns):
    """Make a data set without `from_dict`, whose fingerprint some versions cannot compute."""
    from pyarrow import table

    features = datasets.Features(features)
    rows = table(columns, schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(rows, info=info, fingerprint="0" * 16)


def check_samples(split, offset=0):
    assert torch.equal(split.images[:, 0, 3, 3].long(), split.ids - offset)
    assert torch.equal(split.labels, (split.ids - offset) % 2)


@pytest.mark.extras
def test_a_parquet_file(datasets, tmp_path):
    make_dataset(datasets, 40).to_parquet(tmp_path / "all.parquet")
    data = load_data(f"hf:{tmp_path / 'all.parquet'}")
    assert [len(data.train), len(data.val), len(data.test)] == [28, 4, 8]
    assert data.record["classes"] == ["cat", "dog"]
    assert data.train.images.shape[1:] == (3, 8, 8)
    check_samples(data.train)
    check_samples(data.test)


@pytest.mark.extras
def test_a_folder_of_parquet_files_with_splits(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for part, count in (("train", 16), ("validation", 6), ("test", 4)):
        target = tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        make_dataset(datasets, count, mode="L").to_parquet(target)
    data = load_data("hf:~/set")
    assert [len(data.train), len(data.val), len(data.test)] == [16, 6, 4]
    assert data.record["channels"] == 1
    check_samples(data.train)
    check_samples(data.val, offset=16)
    check_samples(data.test)


@pytest.mark.extras
def test_a_folder_of_images(datasets, tmp_path):
    for part, count in (("train", 8), ("validation", 3)):
        for name in ("ant", "bee"):
            write_images(tmp_path / part / name, count, size=(12, 10))
    with pytest.raises(DataError, match=r"an image of 12 x 10 pixels, expected square"):
        load_data(f"hf:{tmp_path}")
    data = load_data(f"hf:{tmp_path}", image_size=8)
    assert data.record["classes"] == ["ant", "bee"]
    assert [len(data.train), len(data.val), len(data.test)] == [14, 2, 6]
    assert data.notes == (
        f"hf:{tmp_path}: no test split: val is test, and val is held out of train",
    )
    assert data.train.augmentation.pad == 1


@pytest.mark.extras
def test_saved_to_disk_with_text_labels_and_a_test_split_without_labels(datasets, tmp_path):
    train = make_dataset(datasets, 20, labels=["dog", "cat"] * 10)
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "text")
    data = load_data(f"hf:{tmp_path / 'text'}")
    assert data.record["classes"] == ["cat", "dog"]
    assert torch.equal(data.train.labels, 1 - data.train.ids % 2)
    parts = {"train": make_dataset(datasets, 20), "test": make_dataset(datasets, 4, [-1] * 4)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "secret")
    data = load_data(f"hf:{tmp_path / 'secret'}")
    assert len(data.test) == 4
    assert data.notes == (f"hf:{tmp_path / 'secret'}: test has no labels and is left out",)


@pytest.mark.extras
def test_splits_that_number_their_classes_differently(datasets, tmp_path):
    turned = make_dataset(datasets, 6, [1, 0] * 3, classes=("dog", "cat"))
    parts = {"train": make_dataset(datasets, 20), "test": turned}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "turned")
    data = load_data(f"hf:{tmp_path / 'turned'}")
    assert data.record["classes"] == ["cat", "dog"]
    check_samples(data.test)


@pytest.mark.extras
def test_splits_without_labels_or_with_other_names(datasets, tmp_path):
    train = make_dataset(datasets, 20)
    bare = train.remove_columns("label")
    parts = {"Train": train, "test": bare, "dev": train, "eval": train}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "bare")
    place = f"hf:{tmp_path / 'bare'}"
    assert load_data(place).notes == (
        f"{place}: splits that are not used: dev, eval",
        f"{place}: test has no labels and is left out",
    )
    unlabelled = make_dataset(datasets, 4, [None] * 4)
    datasets.DatasetDict(train=unlabelled, dev=train).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"no labelled split train.*the data has train, dev"):
        load_data(f"hf:{tmp_path / 'none'}")
    datasets.DatasetDict(train=bare).save_to_disk(tmp_path / "no")
    with pytest.raises(
        DataError, match=r"got the columns id, img, expected one of type ClassLabel"
    ):
        load_data(f"hf:{tmp_path / 'no'}")


@pytest.mark.extras
def test_other_columns_of_images_are_not_opened(datasets, tmp_path):
    from pyarrow import parquet

    features = {"img": datasets.Image(), "label": datasets.Value("int64"), "x": datasets.Image()}
    columns = {"img": [encode(n, "L") for n in range(9)], "label": [0, 1, 2] * 3}
    mask = [{"bytes": b"no image", "path": None}] * 9
    table = from_columns(datasets, features, **columns, x=mask).data.table
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load_data(f"hf:{tmp_path / 'a.parquet'}").train.classes == 3


def number(classes, **splits):
    """Return the numbers of the labels of each split, and the names of the classes."""
    samples = {part: HubSplit([], labels, classes.get(part)) for part, labels in splits.items()}
    parts, names = number_classes(samples, "hf:x")
    return {part: labels for part, (_, labels) in parts.items()}, names


def test_classes_are_translated_by_name():
    abc, cb = ["a", "b", "c"], ["c", "b"]
    assert number({"train": abc, "test": cb}, train=[0, 1, 2], test=[0, 1]) == (
        {"train": [0, 1, 2], "test": [2, 1]},
        abc,
    )
    assert number({"train": abc}, train=[0, 1], test=["b", "c"])[0]["test"] == [1, 2]
    assert number({"test": abc}, train=[2, 1], test=[0])[0] == {"train": [2, 1], "test": [0]}
    assert number({}, train=["y", "x"], test=["x"]) == ({"train": [1, 0], "test": [0]}, ["x", "y"])
    assert number({}, train=[5, 1]) == ({"train": [5, 1]}, None)


@pytest.mark.parametrize("labels", [[0, 1], ["c"], [["a"]]])
def test_classes_that_train_lacks_are_refused(labels):
    with pytest.raises(
        DataError, match=r"hf:x test: got classes .*, expected those of train, a, b"
    ):
        number({"train": ["a", "b"], "test": ["a", "c"]}, train=[0], test=labels)


def test_splits_are_found_by_their_names():
    assert match_splits(["Test", "valid", "train", "dev"]) == {
        "train": "train",
        "val": "valid",
        "test": "Test",
    }
    assert match_splits(["all"]) == {"train": "all"}
    assert match_splits(["dev", "eval"]) == {}


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        (["test"], ["no split is called train; test is split anew"]),
        (["all"], ["no split is called train; all is split anew"]),
        (["Training"], []),
        (["train[:50%]"], []),
        (["train", "test", "dev"], ["splits that are not used: dev"]),
    ],
)
def test_a_single_split_that_is_not_train_is_said(names, notes):
    assert describe_splits(names) == notes


def test_labels_are_there_for_all_rows_or_for_none():
    assert has_labels([0, 1], "x")
    assert has_labels(["a"], "x")
    for labels in ([None, None], [-1, -1], []):
        assert not has_labels(labels, "x")
    with pytest.raises(
        DataError, match=r"x: row 1: got label None, expected a class; remove the rows"
    ):
        has_labels([0, None, -1], "x")


def test_a_row_without_an_image_is_named():
    with pytest.raises(DataError, match=r"row 3: got None, expected an image; remove the row"):
        open_stored_image(None, "row 3")


@pytest.mark.extras
def test_what_cannot_be_loaded_is_refused_in_one_line(datasets, tmp_path):
    (tmp_path / "code").mkdir()
    ran = tmp_path / "ran"
    (tmp_path / "code" / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    features = {"text": datasets.Value("string"), "label": datasets.Value("int64")}
    no_image = from_columns(datasets, features, text=["a"], label=[0])
    no_image.to_parquet(tmp_path / "text.parquet")
    for place, text in (
        (tmp_path / "code", "datasets cannot load it: "),
        (tmp_path / "broken.parquet", "datasets cannot load it: "),
        (tmp_path / "text.parquet", "got the columns text, label, expected one of type Image"),
        ("nobody/no-such-set", "datasets cannot load it: "),
    ):
        with pytest.raises(DataError) as caught:
            load_data(f"hf:{place}")
        assert str(caught.value).startswith(f"hf:{place}: ")
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.extras
@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({"bytes": None, "path": "http://127.0.0.1:9/a.png"}, "No such file or directory"),
        (
            {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "path": None},
            "not one of",
        ),
        ({"bytes": None, "path": "/dev/zero"}, "got a device, expected a regular file"),
    ],
)
def test_images_of_a_row_are_read_from_files_alone(datasets, tmp_path, stored, text):
    from pyarrow import parquet

    features = {"img": datasets.Image(), "label": datasets.Value("int64")}
    stranger = from_columns(datasets, features, img=[stored], label=[0])
    # the library itself would read the image
    parquet.write_table(stranger.data.table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: row 0: .*{text}"):
        load_data(f"hf:{tmp_path / 'a.parquet'}")


def test_a_missing_library_is_named_with_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"install it with: pip install 'robustsoup\[datasets\]'"):
        load_data(f"hf:{tmp_path}")
