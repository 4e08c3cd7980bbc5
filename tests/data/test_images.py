"""Which files of a folder are read, as what, and what is said about the others."""

import numpy
import pytest
import torch
from command_line import run
from PIL import Image
from small_data import write_images

from robustsoup.data import load_data
from robustsoup.data.images import Decoder
from robustsoup.errors import DataError


def write_greys(folder, values, suffix="png", dtype=numpy.uint8):
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        pixels = numpy.full((8, 8), value, dtype)
        Image.fromarray(pixels).save(folder / f"{number:03}.{suffix}")


def load_all(root, **options):
    """Return all images of an unsplit folder in the order of their ids, and the data."""
    data = load_data(f"folder:{root}", image_size=8, **options)
    parts = (data.train, data.val, data.test)
    order = torch.cat([part.ids for part in parts]).argsort()
    return torch.cat([part.images for part in parts])[order], data


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8_and_said_once(tmp_path, suffix):
    values = [0, 100, 257 * 54, 45_000, 65_535]
    for name in ("a", "b"):
        write_greys(tmp_path / name, values, suffix, numpy.uint16)
    for _ in range(2):  # decoded, then from the cache folder
        images, data = load_all(tmp_path)
        assert images[:5, 0, 0, 0].tolist() == [0, 0, 54, 175, 255]
        assert data.notes == (
            f"{tmp_path}: every image is grey, so images have 1 channel; channels = 3 repeats it",
            f"{tmp_path}: 10 images of 16 bits were scaled to 8",
        )


@pytest.mark.parametrize(
    ("brightest", "note"),
    [
        (4000, "is 4,000 of 65,535, 16 of 255 after scaling; if they hold 12 bits in 16, multiply"),
        (
            200,
            "is 200 of 65,535, 1 of 255 after scaling; if they hold 8 bits in 16, multiply their",
        ),
        (9000, None),
        (0, None),
    ],
)
def test_16_bits_that_hold_fewer_are_doubted(tmp_path, brightest, note):
    for name in ("a", "b"):
        write_greys(tmp_path / name, [0, brightest] * 5, "png", numpy.uint16)
    for _ in range(2):  # decoded, then from the cache folder
        _, data = load_all(tmp_path)
        doubts = tuple(each for each in data.notes if "pixel of 20 images of 16 bits" in each)
        assert len(doubts) == (note is not None)
        assert all(note in doubt for doubt in doubts)
        assert data.train.notes == data.val.notes == data.test.notes == doubts


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16"])
def test_of_a_thin_image_only_the_middle_is_resized(monkeypatch, turned, mode):
    shades = numpy.random.default_rng(0).integers(0, 256, (4000, 5))
    dtype, factor = (numpy.uint16, 257) if mode == "I;16" else (numpy.uint8, 1)
    pixels = (shades.T if turned else shades).astype(dtype) * factor
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    decoded = Decoder(4, 1).convert(image, "thin")
    monkeypatch.setattr("robustsoup.data.images.LARGEST_RATIO", 10**6)
    whole = Decoder(4, 1).convert(image, "thin")
    assert (decoded.int() - whole.int()).abs().max() <= 1
    monkeypatch.setattr("robustsoup.data.images.LARGEST_RATIO", 16)
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, _: Image.new("L", size))
    sizes = []
    monkeypatch.setattr(
        Image.Image,
        "crop",
        lambda image, box, crop=Image.Image.crop: sizes.append(image.size) or crop(image, box),
    )
    Decoder(4, 1).convert(image, "thin")
    assert sorted(sizes[-1]) == [4, 4 * 16]


def test_an_image_that_needs_more_memory_than_there_is_names_its_file(monkeypatch):
    def resize(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", resize)
    with pytest.raises(DataError, match=r"large: cannot be read \(it needs more memory than there"):
        Decoder(4, 1).convert(Image.new("L", (8, 8)), "large")


def test_pixels_of_32_bits_are_refused(tmp_path):
    for name in ("a", "b"):
        write_greys(tmp_path / name, [0.5] * 5, "tif", numpy.float32)
    with pytest.raises(DataError, match=r"\.tif: got pixels of 32 bits from 0\.5 to 0\.5, exp"):
        load_all(tmp_path)


def test_every_ending_of_torchvisions_image_folder_is_read_at_any_depth(tmp_path):
    suffixes = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "TIF", "JPG")
    for name in ("a", "b"):
        for suffix in suffixes:
            folder = tmp_path / name / suffix
            write_greys(folder, [9]) if suffix == "pgm" else write_images(folder, 1, suffix=suffix)
            if suffix == "pgm":
                (folder / "000.png").rename(folder / "000.pgm")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    images, data = load_all(tmp_path)
    assert images.shape[:2] == (2 * len(suffixes), 3)
    assert data.notes == ()


def test_what_was_left_out_is_counted_by_its_ending(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 5)
        for other in ("x.gif", "y.GIF", "notes.txt", "README", ".DS_Store", "._000.png"):
            (tmp_path / name / other).write_text("no image")
    write_images(tmp_path, 2)
    _, data = load_all(tmp_path)
    (note,) = data.notes
    reasons = "4 .gif, 2 .txt, 2 outside the class folders, 2 without an ending"
    assert note.startswith(f"{tmp_path}: skipped 10 files: {reasons}; images end in .bmp, .jpeg, ")


def test_the_error_for_a_class_without_images_says_what_it_holds(tmp_path):
    write_images(tmp_path / "a", 5)
    write_images(tmp_path / "b", 5, suffix="gif")
    with pytest.raises(DataError, match=r"b: got no images but 5 \.gif, expected \.bmp, "):
        load_all(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_a_folder_of_grey_images_has_one_channel_unless_three_are_asked_for(tmp_path, mode):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new(mode, (8, 8)).save(tmp_path / name / f"{number}.png")
    for channels, expected in ((None, 1), (1, 1), (3, 3), (None, 1)):
        images, data = load_all(tmp_path, channels=channels)
        assert images.shape[1] == data.record["channels"] == len(data.record["mean"]) == expected


def test_one_colour_image_makes_three_channels(tmp_path):
    write_greys(tmp_path / "a", range(5))
    write_greys(tmp_path / "b", range(5))
    write_images(tmp_path / "b", 1)
    images, _ = load_all(tmp_path)
    assert images.shape[1] == 3
    assert (images[4, 0] == images[4, 2]).all()
    grey, _ = load_all(tmp_path, channels=1)
    assert torch.equal(grey[1], images[1, :1])


@pytest.mark.parametrize("channels", [0, 2, 4, True, "grey"])
def test_other_numbers_of_channels_are_refused(tmp_path, channels):
    write_images(tmp_path / "a", 5)
    with pytest.raises(DataError, match=r"got channels .*, expected 1 \(grey\) or 3 \(colour\)"):
        load_all(tmp_path, channels=channels)


def test_channels_of_a_source_without_image_files_are_refused():
    with pytest.raises(DataError, match=r'data "digits": got channels 3, which only folder:PATH'):
        load_data("digits", channels=3)


@pytest.mark.parametrize("names", [("train", "val"), ("training", "validation")])
def test_val_is_test_where_no_folder_is_test(tmp_path, names):
    """The layout of ImageNet: results are reported on val."""
    for part, count in zip(names, (8, 3), strict=True):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count)
    write_images(tmp_path / "unlabelled", 3)
    data = load_data(f"folder:{tmp_path}", image_size=8)
    assert [len(data.train), len(data.val), len(data.test)] == [14, 2, 6]
    assert data.notes == (
        f'{tmp_path}: no folder "test": {names[1]} is test, and val is held out of train',
        f"{tmp_path}: folders unlabelled beside {names[0]} are not used",
    )


def test_commands_print_the_notes_once_and_take_channels(tmp_path, capsys):
    for name in ("a", "b"):
        write_greys(tmp_path / "data" / name, range(0, 60_000, 1000), dtype=numpy.uint16)
    data = ("--data", f"folder:{tmp_path / 'data'}", "--image-size", 8)
    net = ("--model", "resnet9:width=2", "-o", tmp_path / "net.safetensors")
    for channels in ((), ("--channels", 3)):
        assert run("train", *data, *channels, *net, "--epochs", 1, "--threat", "clean") == 0
        assert capsys.readouterr().err.count("120 images of 16 bits were scaled to 8") == 1


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_formats_that_start_other_programs_are_refused_whatever_the_ending(tmp_path, suffix):
    """Pillow runs Ghostscript on EPS files, which are programs."""
    for name in ("a", "b"):
        write_greys(tmp_path / name, range(8))
    Image.new("L", (8, 8)).save(tmp_path / "a" / "x.eps")
    (tmp_path / "a" / "x.eps").rename(tmp_path / "a" / f"x.{suffix}")
    with pytest.raises(DataError, match=rf"x\.{suffix}: cannot be read \(not one of BMP, GIF"):
        load_all(tmp_path)
