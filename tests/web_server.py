"""A web server on this machine, for tests of downloads."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serving(
    body: bytes,
    *,
    status: int = 200,
    kind: str = "application/x-gzip",
    announced: int | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Serve `body` for every request; yield the URL and the list of requested paths.

    Args:
        body: the content of every response.
        status: HTTP status of every response.
        kind: Content-Type.
        announced: Content-Length, if it is to differ from the length of `body`.
    """
    requests: list[str] = []

    class RecordingHandler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(announced or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), RecordingHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/cifar.tar.gz", requests
        finally:
            server.shutdown()
            thread.join()


def files_below(root: Path) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to the folder."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
