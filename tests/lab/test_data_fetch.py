"""Downloads, against a server on this machine that can misbehave in every way that mirrors do."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from patience import PATIENCE

from kfacore.errors import DataError, ResourceError
from kfacore.lab.data import fetch as fetch_module
from kfacore.lab.data.fetch import RemoteFile, content_is_right, fetch, mirrors_from

CONTENT = bytes(range(256)) * 600
FILE = RemoteFile("part.gz", hashlib.sha256(CONTENT).hexdigest())


class Server:
    """A mirror: ``/good/`` serves the file, the other folders fail in their own way."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests.append(self.path)
                folder = self.path.split("/")[1]
                body = gzip.compress(CONTENT)
                if folder == "hang":
                    owner.release.wait(PATIENCE)
                    return
                if folder in ("missing", "broken"):
                    self.send_error(404 if folder == "missing" else 503)
                    return
                if folder == "other":
                    body = gzip.compress(CONTENT + b"!")
                if folder == "page":
                    body = b"<html>Please log in to this network</html>"
                self.send_response(200)
                if folder != "unsized":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if folder == "cut" else body)

            def log_message(self, *_: object) -> None:
                """Tests say nothing."""

        self.release = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    running = Server()
    yield running
    running.close()


def silent(*_: object) -> None:
    """A progress nobody looks at."""


def test_fetches_and_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    folder = tmp_path / "new" / "folder"
    (path,) = fetch([FILE], folder, [f"{server.address}/good/"], lambda *piece: seen.append(piece))
    assert path == folder / "part.gz"
    assert gzip.decompress(path.read_bytes()) == CONTENT
    size = path.stat().st_size
    assert seen[0] == ("part.gz", 0, size)
    assert seen[-1] == ("part.gz", size, size)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_right_files_are_not_fetched_again_and_wrong_ones_are(server: Server, tmp_path: Path) -> None:
    mirrors = [f"{server.address}/good"]
    (path,) = fetch([FILE], tmp_path, mirrors, silent)
    fetch([FILE], tmp_path, mirrors, silent)
    assert len(server.requests) == 1
    path.write_bytes(path.read_bytes()[:100])
    assert not content_is_right(path, FILE)
    fetch([FILE], tmp_path, mirrors, silent)
    assert content_is_right(path, FILE)
    assert len(server.requests) == 2


def test_compression_of_the_mirror_does_not_matter(tmp_path: Path) -> None:
    source = tmp_path / "mirror"
    source.mkdir()
    (source / FILE.name).write_bytes(gzip.compress(CONTENT, compresslevel=1, mtime=5))
    (path,) = fetch([FILE], tmp_path / "data", [source.as_uri()], silent)
    assert content_is_right(path, FILE)


def test_server_that_does_not_say_the_size(server: Server, tmp_path: Path) -> None:
    seen: list[int | None] = []
    (path,) = fetch([FILE], tmp_path, [f"{server.address}/unsized"], lambda _, __, total: seen.append(total))
    assert content_is_right(path, FILE)
    assert set(seen) == {None}


@pytest.mark.parametrize("bad", ["missing", "broken", "other", "page", "cut"])
def test_next_mirror_is_tried(server: Server, tmp_path: Path, bad: str) -> None:
    mirrors = [f"{server.address}/{bad}", f"{server.address}/good"]
    (path,) = fetch([FILE], tmp_path, mirrors, silent)
    assert content_is_right(path, FILE)
    assert server.requests == [f"/{bad}/part.gz", "/good/part.gz"]


@pytest.mark.parametrize(
    ("folder", "kind", "message"),
    [
        ("missing", ResourceError, "the server answers 404"),
        ("broken", ResourceError, "the server answers 503"),
        ("cut", ResourceError, r"broke off after \d+ of \d+ bytes"),
        ("other", DataError, "wrong checksum.*Nothing was stored.*--mirror"),
        ("page", DataError, "found no gzip data"),
    ],
)
def test_failures_say_what_happened_and_store_nothing(
    server: Server, tmp_path: Path, folder: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=rf"cannot fetch part\.gz.*{message}"):
        fetch([FILE], tmp_path / "data", [f"{server.address}/{folder}"], silent)
    assert not (tmp_path / "data").exists()


def test_old_file_survives_a_failed_download(server: Server, tmp_path: Path) -> None:
    old = tmp_path / FILE.name
    old.write_bytes(b"what was there")
    with pytest.raises(DataError):
        fetch([FILE], tmp_path, [f"{server.address}/other"], silent)
    assert old.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == [FILE.name]


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"is there a network\?.*no connection.*--mirror.*by hand") as caught:
        fetch([FILE], tmp_path, ["http://127.0.0.1:9"], silent)
    assert caught.value.exit_code == 1


def test_mirror_that_hangs_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "TIMEOUT", 0.2)
    with pytest.raises(ResourceError, match=r"no answer within 0\.2 seconds"):
        fetch([FILE], tmp_path, [f"{server.address}/hang"], silent)


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/", "not an address", "/etc", "http://["])
def test_what_is_no_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(ResourceError, match="cannot fetch"):
        fetch([FILE], tmp_path, [address], silent)


def test_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match=r"cannot write .*part\.gz.*--data-dir"):
        fetch([FILE], tmp_path / "blocked" / "data", [f"{server.address}/good"], silent)


def test_interrupted_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    def interrupt(_: str, done: int, __: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch([FILE], tmp_path, [f"{server.address}/good"], interrupt)
    assert list(tmp_path.iterdir()) == []
    assert content_is_right(fetch([FILE], tmp_path, [f"{server.address}/good"], silent)[0], FILE)


def test_mirrors_come_from_option_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFAC_MIRROR", raising=False)
    assert mirrors_from(None, ("usual",)) == ["usual"]
    monkeypatch.setenv("KFAC_MIRROR", "http://a, http://b,")
    assert mirrors_from(None, ("usual",)) == ["http://a", "http://b"]
    assert mirrors_from("http://c", ("usual",)) == ["http://c"]
    monkeypatch.setenv("KFAC_MIRROR", " ")
    assert mirrors_from("", ("usual",)) == ["usual"]
