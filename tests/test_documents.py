"""JSON and TOML of strangers: plain, bounded data, or one short reason."""

import pytest

from robustsoup.documents import (
    MAX_DEPTH,
    parse_json,
    parse_toml,
    read_json,
    read_toml,
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        (b"\xff", "can't decode byte"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper than 32 levels"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested deeper than 32 levels"),
        ("9" * 5000, "integer"),
        ("9" * 20, "64 bits"),
        ("[9223372036854775808]", "64 bits"),
        ("[1e999]", "not finite"),
        ("[NaN]", "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice"),
        (r'["\ud800"]', "a lone surrogate"),
        (r'{"\udc1b": 1}', "a lone surrogate"),
    ],
)
def test_json_that_later_code_cannot_use_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isascii()


def test_json_of_too_many_values_is_refused_before_it_is_parsed():
    with pytest.raises(ValueError, match="800,000 commas and colons; at most 600,000 are read"):
        parse_json("[" + "0," * 800_000 + "0]")


def test_a_repeated_key_among_many_is_found_quickly():
    text = "{" + ",".join(f'"{number}":0' for number in range(200_000)) + ',"199999":0}'
    with pytest.raises(ValueError, match="the key '199999' stands twice"):  # quadratic: minutes
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = [", "Invalid value"),
        (b"x = '\xff'", "can't decode byte"),
        ("x = " + "[" * 100_000, "nested deeper than 32 levels"),
        ("x = " + "{a = " * 1000, "nested deeper than 32 levels"),
        ("x = " + "[" * 33 + "]" * 33, "nested deeper than 32 levels"),
        (".".join(["a"] * 100_000) + " = 1", "nested deeper than 32 levels"),
        ("[" + " . ".join(['"a b"'] * 100_000) + "]", "nested deeper than 32 levels"),
        ("x = 0x" + "f" * 100_000, "64 bits"),
        ("x = " + "9" * 5000, "integer"),
        ("x = 1e999", "not finite"),
        ("x = {y = nan}", "not finite"),
        ("x = -inf", "not finite"),
    ],
)
def test_toml_that_later_code_cannot_use_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_toml(text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mark_of_utf8_and_line_ends_of_windows_are_read():
    mark = b"\xef\xbb\xbf"
    assert parse_toml(mark + b'x = 1\r\n[t]\r\ny = "\xc3\xbc"\r\n') == {"x": 1, "t": {"y": "ü"}}
    assert parse_json(mark + b'{"x":\r\n 1}') == {"x": 1}


def test_ordinary_content_is_returned_as_it_is():
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json('{"a": [1, -2.5, "ü", null, true], "b": {}}') == {
        "a": [1, -2.5, "ü", None, True],
        "b": {},
    }
    assert parse_json("[-9223372036854775808, 9223372036854775807]") == [-(2**63), 2**63 - 1]
    assert parse_json(deepest)
    assert parse_toml('a.b = [0.1, 0.2]\n[c]\nd = "..............."') == {
        "a": {"b": [0.1, 0.2]},
        "c": {"d": "..............."},
    }


@pytest.mark.parametrize(("read", "text"), [(read_json, "[1]"), (read_toml, "a = 1")])
def test_a_file_is_read_up_to_the_limit(tmp_path, read, text):
    path = tmp_path / "file"
    path.write_text(text)
    assert read(path, len(text))
    with pytest.raises(OSError, match="larger than"):
        read(path, len(text) - 1)
    with pytest.raises(OSError, match="expected a regular file"):
        read(tmp_path)
