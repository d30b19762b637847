"""A hub on the loopback device: as much of the hub's HTTP as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40
REVISIONS = ("main", "v1", COMMIT)


@dataclass
class Hub:
    """What a running hub serves, and what it was asked.

    ``models`` maps an id to the folder of its files; an id in ``gated`` is refused for all but its
    listing. ``down`` answers everything with an error of the server.
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    down: bool = False
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[str]:
        """Names of files whose content was asked for, in order."""
        return [
            line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line
        ]


@contextmanager
def serve(models: dict[str, Path], **options: object) -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub(models, **options)  # type: ignore[arg-type]
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.down:
            self._send(503, b"{}")
        elif path == "api/models":
            wanted = parse_qs(url.query).get("search", [""])[0].lower()
            self._json([{"id": name} for name in self.hub.models if wanted[:4] in name.lower()])
        elif path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"))
        else:
            self._file(path)

    def _api(self, path: str) -> None:
        model, verb, rest = path, "", ""
        for step in ("/revision/", "/tree/"):
            if step in path:
                model, _, rest = path.partition(step)
                verb = step.strip("/")
        folder = self.hub.models.get(model)
        if folder is None:
            self._fail(404, "RepoNotFound")
        elif rest and rest not in REVISIONS:
            self._fail(404, "RevisionNotFound")
        elif verb == "tree":
            self._json(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)}
                    for f in _files(folder)
                ]
            )
        else:
            siblings = [{"rfilename": f.name} for f in _files(folder)]
            self._json({"id": model, "sha": COMMIT, "siblings": siblings})

    def _file(self, path: str) -> None:
        model, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        folder = self.hub.models.get(model)
        if folder is None:
            self._fail(404, "RepoNotFound")
        elif model in self.hub.gated:
            self._fail(403, "GatedRepo")
        elif revision not in REVISIONS:
            self._fail(404, "RevisionNotFound")
        elif not (folder / name).is_file():
            self._fail(404, "EntryNotFound")
        else:
            self._content(folder / name)

    def _content(self, file: Path) -> None:
        raw = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, raw, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last or len(raw) - 1), len(raw) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(raw)}"
        self._send(206, raw[int(first) : end + 1], headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "no"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
