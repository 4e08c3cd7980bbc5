"""Image folders: splits and invalid folders."""

import io
import os
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_data import all_ids, write_images

from robustsoup.data import (
    Augmentation,
    load_data,
)
from robustsoup.errors import DataError


def test_unsplit_folder(tmp_path):
    write_images(tmp_path / "cat", 30)
    write_images(tmp_path / "ant", 20, colour=(200, 0, 0), suffix="bmp")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._000.png").write_text("left by another system")
    (tmp_path / ".hidden").mkdir()
    data = load_data(f"folder:{tmp_path}", image_size=16)
    assert [len(data.train), len(data.val), len(data.test)] == [35, 5, 10]
    assert data.record["classes"] == ["ant", "cat"]
    assert data.record["size"] == [16, 16]
    assert data.train.augmentation == Augmentation(pad=2, flip=True)
    assert torch.equal(all_ids(data.train, data.val, data.test), torch.arange(50))
    for split in (data.train, data.val, data.test):
        assert split.images.is_contiguous()
        assert split.images.shape[1:] == (3, 16, 16)
        assert torch.equal(split.labels, (split.ids >= 20).long())
        number = split.ids - 20 * split.labels
        assert torch.equal(
            split.images[:, 0, 5, 5].long(), torch.where(split.labels == 1, 10, 200) + number
        )
    other = load_data(f"folder:{tmp_path}", seed=1, image_size=16)
    assert torch.equal(other.test.ids, data.test.ids)
    assert other.record["digest"] == data.record["digest"]
    assert other.record["split_digest"] != data.record["split_digest"]
    assert (other.record["mean"], other.record["std"]) == (data.record["mean"], data.record["std"])


def test_split_folder_without_val(tmp_path):
    for part, count in (("train", 40), ("test", 12)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    data = load_data(f"folder:{tmp_path}")
    assert [len(data.train), len(data.val), len(data.test)] == [70, 10, 24]
    assert torch.equal(all_ids(data.train, data.val), torch.arange(80))
    assert torch.equal(all_ids(data.test), torch.arange(24))
    assert data.record["size"] == [32, 32]
    assert len(data.test.first(12).labels.unique()) == 2
    assert torch.equal(load_data(f"folder:{tmp_path}", seed=9).test.ids, data.test.ids)


def test_split_folder_with_val(tmp_path):
    for part, count in (("train", 5), ("val", 3), ("test", 2)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    data, other = (load_data(f"folder:{tmp_path}", seed=seed) for seed in (0, 1))
    assert torch.equal(all_ids(data.train), torch.arange(10))
    assert torch.equal(all_ids(data.val), torch.arange(10, 16))
    assert data.record["split_digest"] == other.record["split_digest"]


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "tram", 10)
    assert load_data(f"folder:{tmp_path}").record["classes"] == ["train", "tram"]


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        ("training_set", "test_set", "training_set and test_set"),
        ("seg_train/seg_train", "seg_test/seg_test", "seg_train and seg_test"),
        ("test_set", "validation_set", "validation_set and test_set"),
    ],
)
def test_splits_under_other_names_are_not_taken_for_classes(tmp_path, train, test, names):
    for part in (train, test):
        for name in ("cats", "dogs"):
            write_images(tmp_path / part / name, 2)
    write_images(tmp_path / "seg_pred", 2)
    with pytest.raises(DataError, match=f"{names} look like splits, because both hold cats, dogs"):
        load_data(f"folder:{tmp_path}")


def test_classes_may_hold_folders_of_the_same_names(tmp_path):
    for name in ("cats", "dogs"):
        for part in ("train", "test"):
            write_images(tmp_path / name / part, 6)
    assert load_data(f"folder:{tmp_path}").record["classes"] == ["cats", "dogs"]


def test_capitals_in_the_names_of_splits_do_not_matter(tmp_path):
    for part, count in (("Train", 5), ("Valid", 3), ("TEST", 2)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    data = load_data(f"folder:{tmp_path}")
    assert [len(data.train), len(data.val), len(data.test)] == [10, 6, 4]
    assert data.record["classes"] == ["a", "b"]


def test_a_path_alone_is_refused_with_its_spelling(tmp_path):
    with pytest.raises(DataError, match=f"got the path .*; try folder:{tmp_path}$"):
        load_data(str(tmp_path))


def test_the_digest_depends_on_the_pixels(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 10)
    before = load_data(f"folder:{tmp_path}").record["digest"]
    Image.new("RGB", (10, 10), (255, 255, 255)).save(tmp_path / "b" / "004.png")
    assert load_data(f"folder:{tmp_path}").record["digest"] != before


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_images_are_cropped_at_the_centre(tmp_path, size):
    """The middle square is white, the rest black; resizing blurs its edge by half a pixel."""
    for name in ("a", "b"):
        write_images(tmp_path / name, 5)
        image = Image.new("L", size, 0)
        image.paste(
            255,
            ((size[0] - 20) // 2, (size[1] - 20) // 2, (size[0] + 20) // 2, (size[1] + 20) // 2),
        )
        for number in range(5):
            image.save(tmp_path / name / f"{number:03}.png")
    images = load_data(f"folder:{tmp_path}", image_size=10).train.images
    assert images.shape[1:] == (1, 10, 10)
    assert (images[:, :, 1:-1, 1:-1] == 255).all()
    assert (images > 150).all()


def write_classes(folder, **images):
    for name, number in images.items():
        write_images(folder / name, number)


def write_file_in_class(folder, name, content):
    write_classes(folder, a=10, b=10)
    (folder / "b" / name).write_bytes(content)


def cut_short_image():
    written = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(written, "png")
    return written.getvalue()[:1000]


def write_empty_class(folder):
    write_classes(folder, a=10, b=10)
    (folder / "c").mkdir()


def write_different_classes(folder):
    write_classes(folder, a=10, b=10)
    write_classes(folder / "train", a=10, b=10)
    write_classes(folder / "test", a=10, B=10)


WRONG_FOLDERS = {
    "missing": lambda folder: None,
    "file": lambda folder: folder.write_text(""),
    "empty": lambda folder: folder.mkdir(),
    "one class": lambda folder: write_classes(folder, a=10),
    "class without images": write_empty_class,
    "broken": lambda folder: write_file_in_class(folder, "003.png", b"not a picture"),
    "cut short": lambda folder: write_file_in_class(folder, "003.png", cut_short_image()),
    "too few": lambda folder: write_classes(folder, a=1, b=1),
    "classes differ": write_different_classes,
    "no test": lambda folder: write_classes(folder / "train", a=3, b=3),
    "no train": lambda folder: [write_classes(folder / p, a=3, b=3) for p in ("Valid", "test")],
    "images in val": lambda folder: [write_images(folder / p, 3) for p in ("train", "val")],
}


@pytest.mark.parametrize(
    ("case", "place", "text"),
    [
        (
            "missing",
            "",
            "got nothing, expected a folder with one sub-folder for each class; check the path",
        ),
        (
            "file",
            "",
            "got a file, expected a folder with one sub-folder for each class; check the path",
        ),
        (
            "empty",
            "",
            (
                "got 0 class folders, expected two or more folders of images, one for each class; "
                "put each class"
            ),
        ),
        ("one class", "", "got 1 class folders, expected two or more folders of images"),
        (
            "class without images",
            "c",
            "got no images, expected .bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp; add",
        ),
        (
            "broken",
            "b/003.png",
            "cannot be read (not one of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP), expected an image;",
        ),
        ("cut short", "b/003.png", "cannot be read ("),
        (
            "too few",
            "",
            "got 0 images to train on after val and test were taken, expected 1 or more",
        ),
        (
            "classes differ",
            "test",
            "got classes B, a, expected those of train, a, b (in only one of them: B, b); make",
        ),
        (
            "no test",
            "test",
            "no such folder, expected two or more folders of images, one for each class; add it",
        ),
        ("no train", "", "got the splits Valid and test without train, expected a folder train;"),
        ("images in val", "train", "got 0 class folders, expected two or more folders"),
    ],
)
def test_the_error_for_a_wrong_folder_names_it(tmp_path, case, place, text):
    data = tmp_path / "data"
    WRONG_FOLDERS[case](data)
    with pytest.raises(DataError) as caught:
        load_data(f"folder:{data}")
    message = str(caught.value)
    assert message.startswith(f"{data / place}: ")
    assert text in message
    assert "\n" not in message


def test_a_wrong_image_size_is_refused(tmp_path):
    with pytest.raises(DataError, match="got image_size 0, expected an integer of at least 1"):
        load_data(f"folder:{tmp_path}", image_size=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_among_the_images_is_refused_without_waiting(tmp_path):
    data = tmp_path / "data"
    write_classes(data, a=10, b=10)
    os.mkfifo(data / "b" / "fifo.png")
    with pytest.raises(DataError, match=r"b/fifo\.png: cannot be read \(.*FIFO") as caught:
        load_data(f"folder:{data}")
    assert "Errno" not in str(caught.value)


LINKS = {
    "image": ("a/loop.png", "loop.png", r"a/loop\.png: cannot be read \(.*symbolic"),
    "missing image": ("a/gone.png", "no.png", r"a/gone\.png: cannot be read \(No such file"),
    "class": ("c", ".", r"data/c: is a link to a folder that holds it, so it is no class"),
    "missing class": ("c", "no", r"data/c: is a link to nothing, expected a folder"),
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_that_leads_nowhere_or_back_is_refused(tmp_path, case):
    data = tmp_path / "data"
    write_classes(data, a=10, b=10)
    place, target, text = LINKS[case]
    (data / place).symlink_to(target)
    with pytest.raises(DataError, match=text):
        load_data(f"folder:{data}")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("..", "linking to a folder above"),
        (".", None),
        ("loop", "linking to nothing"),
    ],
)
def test_a_link_in_a_class_adds_no_image_of_another_class(tmp_path, target, reason):
    data = tmp_path / "data"
    write_classes(data, a=10, b=10)
    (data / "a" / "loop").symlink_to(target)
    loaded = load_data(f"folder:{data}")
    labels = torch.cat([part.labels for part in (loaded.train, loaded.val, loaded.test)])
    assert labels.bincount().tolist() == [10, 10]
    assert len(loaded.notes) == bool(reason)
    assert all(f"skipped 1 files: 1 {reason};" in note for note in loaded.notes)


@pytest.fixture
def stopped_by_permissions():
    """A folder, and chmod for paths in it, after which root is a user whom permissions stop."""
    if os.name != "posix":
        pytest.skip("no permissions on this system")
    user, closed = os.geteuid(), list[Path]()

    def close(path, mode):
        closed.append(path)
        path.chmod(mode)
        if user == 0:
            os.seteuid(65534)

    with tempfile.TemporaryDirectory() as folder:  # unlike tmp_path's, its parents are open to all
        Path(folder).chmod(0o777)
        yield Path(folder), close
        os.seteuid(user)
        for path in closed:
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("place", "mode", "text"),
    [
        ("b/003.png", 0, r"b/003\.png: cannot be read \(Permission denied\)"),
        ("b", 0, r"data/b: cannot be listed \(Permission denied\)"),
        ("b", 0o444, r"data/b/.*: cannot be listed \(Permission denied\)"),
        ("", 0, r"data: cannot be listed \(Permission denied\)"),
        ("", 0o444, r"data/a: cannot be listed \(Permission denied\)"),
    ],
)
def test_what_may_not_be_read_is_named(monkeypatch, stopped_by_permissions, place, mode, text):
    folder, close = stopped_by_permissions
    write_classes(folder / "data", a=10, b=10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    close(folder / "data" / place, mode)
    with pytest.raises(DataError, match=text) as caught:
        load_data(f"folder:{folder / 'data'}")
    assert "\n" not in str(caught.value)
