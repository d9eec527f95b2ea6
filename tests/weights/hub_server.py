"""A hub on this machine: the part of its HTTP API that fetching a snapshot takes. In a thread and a loop of its own."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

TOKEN = "hf_a_token_that_opens_the_gate"


class Hub:
    """`repositories`: name -> revision -> directory. `gated` ones want TOKEN. Counts what it is asked."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.cut_after: dict[str, int] = {}  # file name -> bytes of its first answer, after which the connection breaks
        self.sent: list[tuple[str, str]] = []  # file names with the Range asked for

    def add(self, name: str, directory: Path, *revisions: str) -> str:
        """Serve a directory as main and as `revisions`; returns its commit."""
        commit = hashlib.sha1(f"{name}{directory}".encode()).hexdigest()
        self.repositories.setdefault(name, {}).update(dict.fromkeys((*(revisions or ("main",)), commit), directory))
        return commit

    def _directory(self, request: web.Request) -> tuple[Path, str]:
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if name not in self.repositories:
            raise _refused(web.HTTPUnauthorized, "RepoNotFound")
        if name in self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _refused(web.HTTPForbidden, "GatedRepo")
        revision = request.match_info["revision"]
        if revision not in self.repositories[name]:
            raise _refused(web.HTTPNotFound, "RevisionNotFound")
        directory = self.repositories[name][revision]
        return directory, hashlib.sha1(f"{name}{directory}".encode()).hexdigest()

    async def info(self, request: web.Request) -> web.Response:
        directory, commit = self._directory(request)
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        siblings = [{"rfilename": file.name} for file in sorted(directory.iterdir())]
        return web.json_response({"id": name, "modelId": name, "sha": commit, "tags": [], "siblings": siblings})

    async def tree(self, request: web.Request) -> web.Response:
        directory, _ = self._directory(request)
        files = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)}
            for file in sorted(directory.iterdir())
        ]
        return web.json_response(files)

    async def file(self, request: web.Request) -> web.StreamResponse:
        directory, commit = self._directory(request)
        file = directory / request.match_info["file"]
        if not file.is_file():
            raise _refused(web.HTTPNotFound, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes"}
        data = file.read_bytes()
        if request.method == "HEAD":
            return web.Response(headers=headers | {"Content-Length": str(len(data))})
        asked = request.headers.get("Range", "")
        self.sent.append((file.name, asked))
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        rest = data[start:]
        status = 206 if asked else 200
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=status, headers=headers | {"Content-Length": str(len(rest))})
        await response.prepare(request)
        cut = self.cut_after.pop(file.name, None)
        await response.write(rest[:cut])
        if cut is not None:
            assert request.transport is not None
            await asyncio.sleep(0)
            request.transport.close()
        return response


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _refused(kind: type[web.HTTPException], code: str) -> Any:
    return kind(headers={"X-Error-Code": code}, text=code)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub, ready, done = Hub(), threading.Event(), threading.Event()

    async def serve() -> None:
        app = web.Application()
        model = "/{owner}/{name}"
        app.router.add_get("/api/models" + model + "/revision/{revision}", hub.info)
        app.router.add_get("/api/models" + model + "/tree/{revision}", hub.tree)
        app.router.add_get(model + "/resolve/{revision}/{file:.+}", hub.file)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await asyncio.to_thread(done.wait)
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    try:
        yield hub
    finally:
        done.set()
        thread.join()
