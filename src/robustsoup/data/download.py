"""Download a file completely and check its kind."""

import base64
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from robustsoup.errors import DownloadError
from robustsoup.file_bytes import MAX_FILE_BYTES
from robustsoup.files import cache_folder
from robustsoup.paths import user_path

DOWNLOAD_BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
_URL_SIGNS = "%/:;,=&?+!$'()*~@[]|"

DownloadProgress = Callable[[int, int | None], None]
"""on_progress(done, total) in bytes; total is None if the server does not announce it."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file, identified by its first bytes.

    Attributes:
        name: The kind in words, for errors.
        signatures: The bytes that a file of this kind may start with.
    """

    name: str
    signatures: tuple[bytes, ...]


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return `root`, else $ROBUSTSOUP_DATA, else the folder "data" in the cache folder."""
    return user_path(root or os.environ.get("ROBUSTSOUP_DATA") or cache_folder() / "data")


def download(
    url: str,
    target: Path,
    *,
    kind: FileKind | None = None,
    advice: str,
    on_progress: DownloadProgress | None = None,
) -> None:
    """Download `url` to `target`.

    Args:
        url: The address of the file.
        target: The file to write.
        kind: The expected kind; detects a login or quota page sent instead of the file. None
            accepts every content.
        advice: The end of the error message: what to do on failure.
        on_progress: Called after each block.

    Raises:
        DownloadError: The transfer fails or is cut short, or the content is of another kind.
    """
    with target.open("wb") as file:
        for block, total in _download_blocks(url, kind, advice):
            file.write(block)
            if on_progress:
                on_progress(file.tell(), total)


def _make_request(url: str) -> urllib.request.Request:
    """Return a request for a URL, which may hold a user and a password, and letters of any script.

    What a server redirects to receives no password.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    path, query = (urllib.parse.quote(text, safe=_URL_SIGNS) for text in (parts.path, parts.query))
    request = urllib.request.Request(urllib.parse.urlunsplit((parts.scheme, host, path, query, "")))
    if parts.username is not None:
        user, password = (urllib.parse.unquote(t or "") for t in (parts.username, parts.password))
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _download_blocks(
    url: str, kind: FileKind | None, advice: str
) -> Iterator[tuple[bytes, int | None]]:
    """Yield (block, total bytes); every failure of the transfer is raised as a DownloadError."""
    done, total = 0, None
    try:
        with urllib.request.urlopen(_make_request(url), timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while block := response.read(DOWNLOAD_BLOCK_BYTES):
                if kind and not done and not block.startswith(kind.signatures):
                    got = response.headers.get_content_type()
                    raise DownloadError(
                        f"{url}: got {got} starting {block[:15]!r}, expected {kind.name}; {advice}"
                    )
                done += len(block)
                if max(done, total or 0) > MAX_FILE_BYTES:
                    raise DownloadError(
                        f"{url}: larger than {MAX_FILE_BYTES:,} bytes, the most that are read; "
                        f"{advice}"
                    )
                yield block, total
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(
            f"{url}: the server answered {error.code} {error.reason}, expected 200; {advice}"
        ) from error
    except http.client.IncompleteRead as error:
        raise DownloadError(
            f"{url}: cut short after {done + len(error.partial)} bytes; {advice}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"{url}: cannot be downloaded ({reason}); {advice}") from error
    if total is not None and done < total:
        raise DownloadError(f"{url}: cut short: got {done} bytes, expected {total}; {advice}")
    if not done:
        expected = kind.name if kind else "a file"
        raise DownloadError(f"{url}: got 0 bytes, expected {expected}; {advice}")
