"""Downloading a file, so that what arrives is what was asked for: whole, and no web page in its place."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from robustsoup.errors import DataError

BLOCK = 1 << 20
TIMEOUT_SECONDS = 60

Progress = Callable[[int, int | None], None]


def download(
    url: str,
    target: Path,
    *,
    begins: tuple[bytes, ...],
    kind: str,
    advice: str,
    on_progress: Progress | None = None,
) -> None:
    """Write what `url` gives to `target`. begins: the bytes that a file of this kind may begin with; kind: its name.

    on_progress(done, total) gets bytes; total is None where the server does not say.

    Raises DataError, ending in `advice`, if the transfer fails or is cut short, or begins otherwise (a login or quota page).
    """
    with open(target, "wb") as file:
        for block, total in _blocks(url, begins, kind, advice):
            file.write(block)
            if on_progress:
                on_progress(file.tell(), total)


def _blocks(
    url: str, begins: tuple[bytes, ...], kind: str, advice: str
) -> Iterator[tuple[bytes, int | None]]:
    """Yield (bytes, total) from `url`; every way in which a transfer fails becomes one DataError."""
    done = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while block := response.read(BLOCK):
                if not done and not block.startswith(begins):
                    got = response.headers.get_content_type()
                    raise DataError(
                        f"{url}: got {got} starting {block[:15]!r}, expected {kind}; {advice}"
                    )
                done += len(block)
                yield block, total
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(
            f"{url}: the server answered {error.code} {error.reason}, expected 200; {advice}"
        ) from error
    except http.client.IncompleteRead as error:
        raise DataError(
            f"{url}: cut short after {done + len(error.partial)} bytes; {advice}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{url}: cannot be downloaded ({reason}); {advice}") from error
    if total is not None and done < total:
        raise DataError(f"{url}: cut short: got {done} bytes, expected {total}; {advice}")
    if not done:
        raise DataError(f"{url}: got 0 bytes, expected {kind}; {advice}")
