"""Arrays on disk: checksums, atomic writes, corrupt files, folders that cannot be written."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest

from kfacore.errors import DataError
from kfacore.lab.data import cache_folder, search_folders, sha256_of_arrays, sha256_of_file
from kfacore.lab.data.cache import cached, read_cache, replace_file, write_cache
from kfacore.lab.data.places import named_folder

ARRAYS = {"b": np.arange(6, dtype=np.int16).reshape(2, 3), "a": np.array([0.5, -1.0])}


class Builder:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return dict(ARRAYS)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checksum_depends_on_content_dtype_and_shape_alone() -> None:
    a = np.arange(6, dtype=np.int32).reshape(2, 3)
    same = [a.copy(order="F"), a.astype(">i4"), np.concatenate([a, a])[:2]]
    assert {sha256_of_arrays(other) for other in same} == {sha256_of_arrays(a)}
    others = [a.astype(np.int64), a.reshape(3, 2), a + 1, a.view(np.uint32)]
    assert len({sha256_of_arrays(other) for other in [a, *others]}) == 5
    assert sha256_of_arrays(a, a) != sha256_of_arrays(a)
    assert sha256_of_arrays(a[:0]) != sha256_of_arrays(a[:, :0])
    # a fixed value: run manifests are compared across versions
    assert sha256_of_arrays(np.zeros(2, np.uint8)) == hashlib.sha256(b"u1 (2,);\0\0").hexdigest()


def test_checksum_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_of_file(path) == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(DataError, match=r"missing: cannot be read \(No such file"):
        sha256_of_file(tmp_path / "missing")


def test_replace_file_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replace_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"

    def interrupted() -> None:
        with replace_file(path) as file:
            file.write(b"second, half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"first"
    assert left_over(path.parent) == ["file"]


def test_cache_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "cache.npz"
    write_cache(path, ARRAYS)
    read = read_cache(path)
    assert sorted(read) == ["a", "b"]
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert left_over(tmp_path) == ["cache.npz"]


def test_cached_builds_once(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        np.testing.assert_array_equal(cached(tmp_path / "deep" / "c.npz", build)["b"], ARRAYS["b"])
    assert build.calls == 1


def spoil_bytes(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def swap_content(path: Path) -> None:
    """A sound .npz file whose stored checksum belongs to other arrays."""
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files}
    np.savez(path, **{**content, "a": content["a"] + 1})


def no_checksum(path: Path) -> None:
    np.savez(path, **ARRAYS)


@pytest.mark.parametrize("spoil", [spoil_bytes, truncate, swap_content, no_checksum, lambda path: path.write_text("?")])
def test_corrupt_cache_is_named_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: object) -> None:
    path = tmp_path / "c.npz"
    build = Builder()
    cached(path, build)
    assert callable(spoil)
    spoil(path)
    with pytest.raises(DataError, match=r"c\.npz"):
        read_cache(path)
    np.testing.assert_array_equal(cached(path, build)["a"], ARRAYS["a"])
    assert build.calls == 2
    assert "corrupt cache" in caplog.text
    cached(path, build)
    assert build.calls == 2
    assert left_over(tmp_path) == ["c.npz"]


def test_cache_with_another_known_checksum_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "c.npz"
    build = Builder()
    checksum = sha256_of_arrays(ARRAYS["a"], ARRAYS["b"])
    cached(path, build, checksum=checksum)
    cached(path, build, checksum=checksum)
    assert build.calls == 1
    cached(path, build, checksum="0" * 64)
    assert build.calls == 2
    assert "does not hold the expected arrays" in caplog.text


def test_folder_that_cannot_be_written_costs_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")  # holds for root too, unlike permissions
    with caplog.at_level(logging.WARNING):
        arrays = cached(blocked / "c.npz", Builder())
    np.testing.assert_array_equal(arrays["b"], ARRAYS["b"])
    assert "going on without it" in caplog.text
    assert "KFAC_DATA" in caplog.text


def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    build = Builder()
    cached(tmp_path / "c.npz", build)
    assert "No space left on device" in caplog.text
    assert left_over(tmp_path) == []


def test_cache_folder_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFAC_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "kfac"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / "home" / ".cache" / "kfac"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kfac"
    monkeypatch.setenv("KFAC_DATA", str(tmp_path / "data"))
    assert cache_folder() == tmp_path / "data"
    assert cache_folder("~/mine") == tmp_path / "home" / "mine"


def test_a_folder_that_is_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert named_folder("~/mine") == tmp_path / "mine"
    with pytest.raises(DataError, match=r"nowhere does not exist; name an existing one with --data-dir, or leave it"):
        named_folder(tmp_path / "nowhere")


def test_search_folders_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KFAC_DATA", str(tmp_path / "data"))
    assert search_folders(tmp_path) == [tmp_path, tmp_path / "data", tmp_path / "xdg" / "kfac"]
    monkeypatch.setenv("KFAC_DATA", str(tmp_path))
    assert search_folders(tmp_path) == [tmp_path, tmp_path / "xdg" / "kfac"]
    with pytest.raises(DataError, match=r"does not exist.*--data-dir"):
        search_folders(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        search_folders(tmp_path / "file")
