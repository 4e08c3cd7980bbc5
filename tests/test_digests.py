"""A file is compared with its digest: by size and time first, by content where they differ."""

import os

import pytest

from robustsoup.digests import FileDigest, digest_folder, digest_json, find_damaged_file


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path, FileDigest.of(path)


def change_keeping_time(path, content):
    state = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_an_unchanged_file_is_undamaged_and_a_copy_too(written, tmp_path):
    path, digest = written
    assert digest.find_damage(path) is None
    copy = tmp_path / "copy"
    copy.write_bytes(b"content")
    os.utime(copy, (1, 1))
    assert digest.find_damage(copy) is None
    assert digest.find_damage(copy, thorough=True) is None


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"", "got 0 bytes, expected 7"),
        (b"content+", "got 8 bytes, expected 7"),
        (b"Content", "its content changed"),
    ],
)
def test_another_size_or_content_is_damage(written, content, damage):
    path, digest = written
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert digest.find_damage(path) == damage


def test_a_change_that_keeps_size_and_time_is_found_on_request(written):
    path, digest = written
    change_keeping_time(path, b"Content")
    assert digest.find_damage(path) is None
    assert digest.find_damage(path, thorough=True) == "its content changed"


def test_what_is_no_file_is_damage_and_is_not_read(written, tmp_path):
    path, digest = written
    path.unlink()
    assert digest.find_damage(path) == "is missing"
    path.mkdir()
    assert digest.find_damage(path) == "is no file"
    assert "cannot be read" in digest.find_damage(tmp_path / "null\0character")
    assert "cannot be read" in digest.find_damage(tmp_path / ("long" * 100))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        assert digest.find_damage(tmp_path / "fifo", thorough=True) == "is no file"


def test_a_digest_survives_json_and_nothing_else_is_one(written):
    _, digest = written
    assert FileDigest.from_json(digest.to_json()) == digest
    good = digest.to_json()
    for bad in (None, [], 3, {}, good | {"bytes": "7"}, good | {"sha256": 1}):
        with pytest.raises(ValueError, match="expected bytes, sha256 and modified_ns"):
            FileDigest.from_json(bad)


def test_a_folder_is_compared_file_by_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    (tmp_path / "c").write_text("y")
    digests = digest_folder(tmp_path)
    assert list(digests) == ["a/b", "c"]
    assert find_damaged_file(tmp_path, digests) is None
    (tmp_path / "a" / "b").unlink()
    assert find_damaged_file(tmp_path, digests) == "a/b: is missing"


def test_the_digest_of_json_ignores_layout_alone():
    assert digest_json({"a": (1, 2), "b": None}) == digest_json({"b": None, "a": [1, 2]})
    assert digest_json({"a": 1}) != digest_json({"a": 1.5})
