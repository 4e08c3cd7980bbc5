"""Text for a terminal, a log or a message: no character of it is an instruction."""

import re

MAX_MESSAGE = 2000
"""Most characters of an error message."""

_WORD = re.compile(r"""[^\s"']+""")


def make_printable(text: str) -> str:
    r"""Replace each character that is not printable with its escape, such as \x1b or \u202e.

    Names and messages come from files of strangers. Control characters, line breaks, marks that
    change the direction of text or join characters, and lone surrogates are all escaped, so the
    result is one line. Printable text is returned as it is, in every script.

    Args:
        text: Any text.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def make_message(text: str) -> str:
    """Return printable text without queries of addresses or the middle beyond MAX_MESSAGE."""
    if "?" in text:
        text = _WORD.sub(_hide_query, text)
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} [{len(text) - 2 * half:,} more characters] {text[-half:]}"
    return make_printable(text)


def _hide_query(word: re.Match[str]) -> str:
    """Return a word of a message, without the query of an address, which may hold a key.

    A path writes the two slashes of an address as one.
    """
    place, _, query = word[0].partition("?")
    if not query or not ("http:/" in place or "https:/" in place):
        return word[0]
    return place + query[len(query.rstrip(":;,.)")) :]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none, for messages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
