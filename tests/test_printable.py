"""Text that goes to a terminal holds no instruction for it, and is one line."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustsoup.errors import RobustsoupError
from robustsoup.printable import MAX_MESSAGE, make_message, make_printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("grüße, 世界, 🍜", "grüße, 世界, 🍜"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x7f\x80\x9b", r"\x7f\x80\x9b"),
        ("\u202eevil", r"\u202eevil"),
        ("\u2066\u200d\u200b\ufeff", r"\u2066\u200d\u200b\ufeff"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_not_printable_is_escaped(text, shown):
    assert make_printable(text) == shown
    assert str(RobustsoupError(text)) == shown


def test_every_character_that_controls_or_formats_is_escaped():
    for number in range(sys.maxunicode + 1):
        shown = make_printable(chr(number))
        kinds = {unicodedata.category(character) for character in shown}
        assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"}), hex(number)


@given(st.text())
def test_printable_text_stays_and_is_one_line(text):
    shown = make_printable(text)
    assert len(shown.splitlines()) <= 1
    assert make_printable(shown) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://a.b/c.pth?key=SECRET: no such file", "https://a.b/c.pth: no such file"),
        ("https:/a.b:9/c?k=S#d, 'http://a/b?x'; d?", "https:/a.b:9/c, 'http://a/b'; d?"),
        ("(https://a/b?" + "x" * 5000 + ")", "(https://a/b)"),
        (
            "wds:/a/part-?.tar: did you mean https://a/b?",
            "wds:/a/part-?.tar: did you mean https://a/b?",
        ),
    ],
)
def test_messages_hold_no_query_of_an_address(text, shown):
    assert make_message(text) == shown
    assert str(RobustsoupError(text)) == shown


def test_a_long_message_loses_its_middle():
    message = make_message("start" + "\x1b" * 10_000_000 + "end")
    assert len(message) < 5 * MAX_MESSAGE
    assert message.startswith(r"start\x1b")
    assert message.endswith(r"\x1bend")
    assert "more characters" in message
