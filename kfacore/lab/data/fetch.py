"""Downloads: several mirrors, verified content, never a half-written file.

The data of a file arrive under a temporary name and get their real one only when their checksum is right, so an
interrupted download can simply be started again.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kfacore.errors import DataError, ResourceError
from kfacore.lab.data.cache import replace_file
from kfacore.lab.data.status import Progress

__all__ = ["TIMEOUT", "RemoteFile", "content_is_right", "fetch", "mirrors_from"]

TIMEOUT = 30.0
"""Seconds without an answer, or without a further byte, after which a mirror is given up."""

_PIECE = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """A file that mirrors offer.

    Attributes:
        name: Its name, appended to a mirror's address; gzip data if it ends in ``.gz``.
        sha256: Checksum (hex) of the content, after decompression: that is what is known of a data set, while the
            compressed bytes depend on the program that made them.
    """

    name: str
    sha256: str


def mirrors_from(option: str | None, usual: Sequence[str]) -> list[str]:
    """The mirrors to try: the option, else the environment variable ``KFAC_MIRROR``, else the usual ones.

    Args:
        option: What the user gave; several addresses may be separated by commas.
        usual: Addresses if nothing is given.
    """
    given = option or os.environ.get("KFAC_MIRROR") or ""
    return [address.strip() for address in given.split(",") if address.strip()] or list(usual)


def content_is_right(path: Path, file: RemoteFile) -> bool:
    """Whether a file on disk has the content it should have; false if it is missing or cannot be read."""
    try:
        raw = path.read_bytes()
        return _content_sha256(raw, file.name) == file.sha256
    except (OSError, EOFError, zlib.error):
        return False


def fetch(files: Sequence[RemoteFile], folder: Path, mirrors: Sequence[str], progress: Progress) -> list[Path]:
    """Download what is not there yet.

    Args:
        files: The files.
        folder: Where to put them; made if needed.
        mirrors: Base addresses, tried in this order for each file.
        progress: Told the file's name, the bytes so far and the bytes in all (None if the server does not say).

    Returns:
        The files' paths, all complete and with the right content.

    Raises:
        ResourceError: No mirror could be reached or has the file, or the folder cannot be written.
        DataError: A mirror answered with something else than the file.
    """
    paths = []
    for file in files:
        path = folder / file.name
        if not content_is_right(path, file):
            _fetch_one(file, path, mirrors, progress)
        paths.append(path)
    return paths


def _fetch_one(file: RemoteFile, path: Path, mirrors: Sequence[str], progress: Progress) -> None:
    failures: list[str] = []
    wrong_content = False
    for mirror in mirrors:
        address = f"{mirror.rstrip('/')}/{file.name}"
        try:
            raw = _download(address, file.name, progress)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not an address at all
            failures.append(f"{address}: {_reason(error)}")
            continue
        try:
            found = _content_sha256(raw, file.name)
        except (OSError, EOFError, zlib.error) as error:
            found = f"no gzip data ({error})"
        if found != file.sha256:
            wrong_content = True
            failures.append(f"{address}: wrong checksum (SHA-256 of the content is {file.sha256}, found {found})")
            continue
        try:
            with replace_file(path) as target:
                target.write(raw)
        except OSError as error:
            raise ResourceError(
                f"cannot write {path} ({error.strerror or error}); choose another folder with --data-dir"
            ) from error
        return
    reasons = "; ".join(failures) or "no mirror is given"
    if wrong_content:
        raise DataError(f"cannot fetch {file.name}: {reasons}. Nothing was stored; try another --mirror")
    raise ResourceError(
        f"cannot fetch {file.name}, is there a network? {reasons}. Name another server with --mirror, or put the file "
        f"into {path.parent} by hand"
    )


def _download(address: str, name: str, progress: Progress) -> bytes:
    if not address.startswith(("http://", "https://", "file://")):
        raise ValueError("a mirror's address starts with http://, https:// or file://")
    request = urllib.request.Request(address, headers={"User-Agent": "kfacore"})
    pieces: list[bytes] = []
    done = 0
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        stated = response.headers.get("Content-Length")
        total = int(stated) if stated and stated.isdigit() else None
        progress(name, 0, total)
        while piece := response.read(_PIECE):
            pieces.append(piece)
            done += len(piece)
            progress(name, done, total)
    if total is not None and done != total:  # read(n) takes a closed connection for the end of the data
        raise OSError(f"the connection broke off after {done} of {total} bytes")
    return b"".join(pieces)


def _content_sha256(raw: bytes, name: str) -> str:
    content = gzip.decompress(raw) if name.endswith(".gz") else raw
    return hashlib.sha256(content).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({error.reason})"
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} seconds"
    return str(error) or type(error).__name__
