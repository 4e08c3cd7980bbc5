"""A Hugging Face Hub on this machine, which speaks as much of its protocol as robustsoup uses."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMIT = "c" * 40
SHORT_FILE = 1000
"""Files of fewer bytes are kept in Git, others as large files (LFS)."""


@dataclass
class Hub:
    """The repositories of the server, and what it was asked.

    Attributes:
        files: Content by (repository, file).
        requests: "METHOD path" of each request.
        tokens: The Authorization headers that arrived.
        cut: Bytes after which the next download breaks off.
        states: The ETag to state for a file, instead of its digest.
    """

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    cut: int | None = None
    states: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def etag(self, name: str, content: bytes) -> tuple[str, bool]:
        """Return the digest that the hub states for a file, and whether it is a large one."""
        large = len(content) >= SHORT_FILE
        digest = hashlib.sha256(content) if large else hashlib.sha1(_as_blob(content))
        return self.states.get(name, digest.hexdigest()), large


def _as_blob(content: bytes) -> bytes:
    return b"blob %d\0" % len(content) + content


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._note()
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            names = [name for repo, name in self.hub.files if repo == found[1]]
            if not names and found[1] not in self.hub.private:
                return self._refuse(404, "RepoNotFound")
            if (found[2] or "").startswith("/tree/"):
                return self._answer(
                    [{"type": "file", "path": n, "size": 1, "oid": "0"} for n in names]
                )
            siblings = [{"rfilename": name} for name in names]
            private = self.hub.private.get(found[1], False)
            return self._answer(
                {"id": found[1], "sha": COMMIT, "siblings": siblings, "private": private}
            )
        if path == "/api/whoami-v2":
            return self._answer({"name": "someone", "type": "user", "orgs": []})
        return self._refuse(404, "EntryNotFound")

    def do_POST(self) -> None:
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            if self.headers.get("Authorization") is None:
                self._refuse(401, "unauthorized")
            else:
                self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= SHORT_FILE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files, "commitOid": COMMIT})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(found[1], body)
        else:
            self._refuse(404, "unknown")

    def do_PUT(self) -> None:
        path = self._note()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.uploads[path.rpartition("/")[2]] = content
        self._answer({})

    def _create(self, asked: dict[str, str | bool | None]) -> None:
        repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if repo in self.hub.private:
            self._answer({"url": f"{self.hub.url}/{repo}", "name": repo}, status=409)
            return
        asks_private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.private[repo] = bool(asks_private)
        self._answer({"url": f"{self.hub.url}/{repo}", "name": repo})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[repo, value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                self.hub.files[repo, value["path"]] = self.hub.uploads[value["oid"]]
        self._answer(
            {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}",
            }
        )

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if not any(known == repo for known, _ in self.hub.files):
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif (repo, name) not in self.hub.files:
            self._refuse(404, "EntryNotFound")
        else:
            self._send_file(repo, name)

    def _send_file(self, repo: str, name: str) -> None:
        content = self.hub.files[repo, name]
        etag, large = self.hub.etag(name, content)
        begin = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0])[0])
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if begin:
            total = len(content)
            self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "GET":
            end, self.hub.cut = self.hub.cut, None
            self.wfile.write(content[begin:end])
            self.close_connection = end is not None

    def _note(self) -> str:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.append(token)
        return path

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"no: {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """Run a hub, and yield it."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
