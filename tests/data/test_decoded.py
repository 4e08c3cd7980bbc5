"""Decoded folders: decoded once, mapped, and never confused or left incomplete."""

import json
import os
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from small_data import write_images

from robustsoup.data import load_data
from robustsoup.data.splits import Samples, channel_statistics, content_digest, hold_out
from robustsoup.errors import DataError, StorageError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The cache of decoded folders on Linux; outside of tmp_path, which some tests decode."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "robustsoup" / "folders"


LAYOUTS = {
    "whole": {"a": 9, "b": 12, "c": 7},
    "split": {"train/a": 9, "train/b": 12, "test/a": 4, "test/b": 3},
    "split with val": {
        "train/a": 9,
        "train/b": 12,
        "val/a": 2,
        "val/b": 3,
        "test/a": 4,
        "test/b": 3,
    },
}


def load_folder(root, seed=0, image_size=None, on_progress=None):
    return load_data(f"folder:{root}", seed=seed, image_size=image_size, on_progress=on_progress)


def write_noise(root, layout, seed=0):
    """Write noise images of several sizes, in colour and grey, as PNG."""
    random = numpy.random.default_rng(seed)
    for name, count in layout.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            shape = (int(random.integers(5, 40)), int(random.integers(5, 40)))
            pixels = random.integers(
                0, 256, shape if number == 2 else (*shape, 3), dtype=numpy.uint8
            )
            Image.fromarray(pixels).save(root / name / f"{number:03}.png")


def decode_plainly(root, size):
    """Decode all of PATH/CLASS/*, in sorted order."""
    images, labels = [], []
    for label, folder in enumerate(sorted(root.iterdir())):
        for file in sorted(folder.iterdir()):
            image = Image.open(file).convert("RGB")
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            pixels = numpy.array(image.resize((width, height), Image.Resampling.BILINEAR))
            top, left = (height - size) // 2, (width - size) // 2
            images.append(
                torch.from_numpy(pixels[top : top + size, left : left + size]).permute(2, 0, 1)
            )
            labels.append(label)
    return Samples(torch.stack(images), torch.tensor(labels), torch.arange(len(labels)))


def split_plainly(root, size, seed):
    """Split (train, val, test, pool) by the rules in the docstring of load_folder."""
    if not (root / "train").is_dir():
        samples = decode_plainly(root, size)
        pool, test = (
            samples.take(rows) for rows in hold_out(len(samples), len(samples) // 5, "folder test")
        )
        return *(pool.take(rows) for rows in hold_out(len(pool), len(pool) // 8, seed)), test, pool
    train, test = decode_plainly(root / "train", size), decode_plainly(root / "test", size)
    test = test.take(hold_out(len(test), 0, "folder order")[0])
    if not (root / "val").is_dir():
        return (
            *(train.take(rows) for rows in hold_out(len(train), len(train) // 8, seed)),
            test,
            train,
        )
    val, n = decode_plainly(root / "val", size), len(train)
    pool = Samples(
        torch.cat([train.images, val.images]),
        torch.cat([train.labels, val.labels]),
        torch.arange(n + 5),
    )
    rows = hold_out(n, 0, "folder order")[0], n + hold_out(5, 0, "folder order")[0]
    return *(pool.take(chosen) for chosen in rows), test, pool


def check_same_data(left, right):
    assert left.record == right.record
    for name in ("train", "val", "test"):
        first, second = left.split(name), right.split(name)
        assert first.digest == second.digest
        assert all(
            torch.equal(getattr(first, key), getattr(second, key))
            for key in ("images", "labels", "ids")
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 5])
def test_a_folder_equals_plain_decoding(tmp_path, layout, seed):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS[layout])
    *expected, pool = split_plainly(root, 12, seed)
    events = []
    first = load_folder(root, seed, 12, lambda *event: events.append(event))
    reloaded = load_folder(root, seed, 12, lambda *event: events.append(event))
    total = sum(LAYOUTS[layout].values())
    assert events == [(number, total, "images decoded") for number in range(1, total + 1)]
    for data in (first, reloaded):
        for name, samples in zip(("train", "val", "test"), expected, strict=True):
            split = data.split(name)
            assert torch.equal(split.images, samples.images)
            assert torch.equal(split.labels, samples.labels)
            assert torch.equal(split.ids, samples.ids)
            assert split.images.is_contiguous()
            assert split.labels.dtype == split.ids.dtype == torch.int64
        assert data.record["digest"] == content_digest(pool, expected[2])
        assert (data.record["mean"], data.record["std"]) == tuple(
            map(list, channel_statistics(pool.images))
        )
    check_same_data(first, reloaded)


def overwrite_content(file):
    """Make the file unreadable, leaving its size and time as they are."""
    times = file.stat()
    file.write_bytes(bytes(times.st_size))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_an_unchanged_folder_is_not_decoded_again(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["split with val"])
    first = load_folder(root)
    file = root / "val" / "b" / "001.png"
    overwrite_content(file)
    check_same_data(load_folder(root), first)
    assert load_folder(root, 1).record["split_digest"] == first.record["split_digest"]
    assert len(list(cache.iterdir())) == 1
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match="cannot be read"):
        load_folder(root)
    assert len(list(cache.iterdir())) == 1


def test_spellings_of_one_folder_share_one_cache_entry(tmp_path, cache, monkeypatch):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for spelling in (tmp_path / "data", "data", "./data/", "link"):
        load_folder(spelling)
    assert len(list(cache.iterdir())) == 1


def test_folders_that_differ_only_in_pixels_have_separate_entries(tmp_path):
    """Names, sizes and times are equal, as unpacked from two archives without times."""
    for place, colour in (("one", (1, 2, 3)), ("two", (90, 80, 70))):
        for name in ("a", "b"):
            write_images(tmp_path / place / name, 8, suffix="bmp", colour=colour)
        for file in (tmp_path / place).rglob("*.bmp"):
            os.utime(file, (0, 0))
    one, two = (load_folder(tmp_path / place).record["digest"] for place in ("one", "two"))
    assert one != two


def test_writing_to_images_stays_in_this_process(tmp_path):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    changed, expected = (load_folder(tmp_path / "data") for _ in range(2))
    before = expected.train.images.clone()
    changed.train.images.zero_()
    assert torch.equal(expected.train.images, before)
    assert torch.equal(load_folder(tmp_path / "data").train.images, before)


@pytest.mark.parametrize(
    "damage",
    [
        "cut short",
        "wrong shape",
        "no record",
        "broken record",
        "other record",
        "empty",
        "a pixel",
        "a mean",
        "a digit of the digest",
    ],
)
def test_damaged_files_are_decoded_again(tmp_path, cache, damage):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    expected = load_folder(tmp_path / "data")
    (place,) = cache.iterdir()
    # Replaced rather than written to: `expected` still looks at the old ones.
    content = (place / "train.npy").read_bytes()
    (place / "train.npy").unlink()
    if damage == "cut short":
        (place / "train.npy").write_bytes(content[:-1])
    elif damage == "wrong shape":
        numpy.save(place / "train.npy", numpy.zeros((2, 3, 32, 32), dtype=numpy.uint8))
    elif damage == "empty":
        (place / "train.npy").write_bytes(b"")
    elif damage == "a pixel":
        (place / "train.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage in ("a mean", "a digit of the digest"):
        (place / "train.npy").write_bytes(content)
        record = json.loads((place / "about.json").read_text())
        if damage == "a mean":
            record["mean"][0] += 1e-3
        else:
            record["digest"] = record["digest"].translate(str.maketrans("0123", "1230"))
        (place / "about.json").write_text(json.dumps(record))
    else:
        (place / "train.npy").write_bytes(content)
        (place / "about.json").unlink()
    if damage in ("broken record", "other record"):
        (place / "about.json").write_text("{" if damage == "broken record" else "[]")
    check_same_data(load_folder(tmp_path / "data"), expected)
    assert list(cache.iterdir()) == [place]


def run_script(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


LOAD_AND_DIE = """
import os, sys
from robustsoup.data import load_data
exit_at_five = lambda done, total, figures: done == 5 and os._exit(9)
load_data(f"folder:{sys.argv[1]}", on_progress=exit_at_five)
"""


def test_a_killed_load_leaves_no_folder_that_looks_complete(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["whole"])
    assert run_script(LOAD_AND_DIE, root).returncode == 9
    (leftover,) = cache.iterdir()
    assert leftover.name.endswith(".tmp")
    *expected, _ = split_plainly(root, 32, 0)
    assert torch.equal(load_folder(root).train.images, expected[0].images)
    assert not leftover.exists()
    load_folder(root, 1)
    assert len(list(cache.iterdir())) == 2


LOAD_AND_PRINT = """
import sys
from robustsoup.data import load_data
print(load_data(f"folder:{sys.argv[1]}").test.images.sum().item())
"""


def test_processes_that_decode_at_the_same_time_agree(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["whole"])
    command = [sys.executable, "-c", LOAD_AND_PRINT, str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert printed == [f"{load_folder(root).test.images.sum().item()}\n"] * 2
    assert len(list(cache.iterdir())) == 1


def test_the_slower_of_two_loads_uses_the_folder_of_the_faster(tmp_path, cache):
    root = tmp_path / "data"
    write_noise(root, LAYOUTS["whole"])
    winners = []

    def race(done, total, figures):
        if done == total:
            winners.append(load_folder(root))

    check_same_data(load_folder(root, 0, on_progress=race), winners[0])
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("kind", ["FIFO", "dangling link"])
def test_the_error_for_a_file_that_only_looks_like_an_image_names_it(tmp_path, cache, kind):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    odd = tmp_path / "data" / "a" / "x.png"
    os.mkfifo(odd) if kind == "FIFO" else odd.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError) as caught:
        load_folder(tmp_path / "data")
    assert str(caught.value).startswith(f"{odd}: cannot be read (")
    assert not list(cache.iterdir())


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError) as caught:
        load_folder(tmp_path / "data")
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'robustsoup' / 'folders'}: decoded images cannot be stored there: "
        "Not a directory; free space there, permit writing, or set XDG_CACHE_HOME to another folder"
    )


def test_too_little_space_is_an_error_before_decoding(tmp_path, cache):
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    with pytest.raises(
        StorageError, match=r"GB free, needed 3360\.00 GB; free space there"
    ) as caught:
        load_folder(tmp_path / "data", 0, image_size=200_000)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


LOAD_ON_A_FULL_DISK = """
import resource, sys
from robustsoup.data import load_data
from robustsoup.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    load_data(f"folder:{sys.argv[1]}")
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_disk_that_becomes_full(tmp_path, cache):
    """A limit on the size of files simulates a full disk: a write fails half-way."""
    write_noise(tmp_path / "data", LAYOUTS["whole"])
    done = run_script(LOAD_ON_A_FULL_DISK, tmp_path / "data")
    assert done.stdout.startswith(
        f"{cache}: decoded images cannot be stored there: File too large; free space there"
    )
    assert not list(cache.iterdir())


MEASURE_MEMORY = """
import sys
from robustsoup.data import batches, load_data

def anonymous():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024

def measure_growth(root):
    seen = [anonymous()]
    record = lambda done, total, figures: seen.append(anonymous())
    data = load_data(f"folder:{root}", image_size=96, on_progress=record)
    for split in (data.train, data.val, data.test):
        for images, labels, ids in batches(split, 8, seed=0, epoch=0):
            images.sum()
    seen.append(anonymous())
    return data, max(seen) - seen[0]

warm, small, large = sys.argv[1:]
# The data stays referenced, so its mappings stay open.
results = [measure_growth(root) for root in (warm, small, large, small, large)]
print(*(growth for _, growth in results[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_folder(tmp_path):
    """Peak anonymous memory while 16 and 63 MiB of images are decoded and used, twice."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=numpy.uint8)
    roots = [tmp_path / name for name in ("warm", "small", "large")]
    for root, count in zip(roots, (30, 300, 1200), strict=True):
        for name in ("a", "b"):
            (root / name).mkdir(parents=True)
            Image.fromarray(pixels).save(root / name / "0000.png")
            for number in range(1, count):
                shutil.copy(root / name / "0000.png", root / name / f"{number:04}.png")
    done = run_script(MEASURE_MEMORY, *roots)
    assert done.returncode == 0, done.stderr
    small, large, small_again, large_again = map(float, done.stdout.split())
    assert large - small < 12
    assert large_again - small_again < 12
