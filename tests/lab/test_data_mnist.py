"""Finding and reading MNIST in all its forms; the real files are used where a developer has them."""

from __future__ import annotations

import gzip
import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest

from kfacore.errors import DataError
from kfacore.lab.data import mnist
from kfacore.lab.data.fetch import RemoteFile
from kfacore.lab.data.idx import idx_bytes
from kfacore.lab.data.mnist import FILES, fetch_mnist, find_mnist, mnist_status, read_mnist

REAL = Path(__file__).parents[3] / "shared" / "data"


def tiny() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 6, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 3, dtype=np.uint8),
    }


def write_idx(folder: Path, arrays: dict[str, np.ndarray], *, packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        raw = idx_bytes(array)
        file = FILES[name].name
        if packed:
            (folder / file).write_bytes(gzip.compress(raw))
        else:
            (folder / file.removesuffix(".gz")).write_bytes(raw)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data of this machine are seen."""
    monkeypatch.delenv("KFAC_DATA", raising=False)
    monkeypatch.delenv("KFAC_MIRROR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def standard(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Tiny arrays that count as the standard MNIST."""
    arrays = tiny()
    files = {
        name: RemoteFile(file.name, hashlib.sha256(idx_bytes(arrays[name])).hexdigest()) for name, file in FILES.items()
    }
    monkeypatch.setattr(mnist, "FILES", files)
    return arrays


def assert_same(found: mnist.Mnist, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), array)
        assert getattr(found, name).dtype == np.uint8


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "mnist", "MNIST/raw"])
def test_four_idx_files(tmp_path: Path, standard: dict[str, np.ndarray], packed: bool, below: str) -> None:
    write_idx(tmp_path / "data" / below, standard, packed=packed)
    found = read_mnist(tmp_path / "data")
    assert_same(found, standard)
    assert found.verified
    assert len(found.source) == 4


def test_npz_file_of_any_integer_type(tmp_path: Path, standard: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "mnist.npz", **{name: array.astype(np.int64) for name, array in standard.items()})
    found = read_mnist(tmp_path)
    assert_same(found, standard)
    assert found.verified
    assert found.source == (tmp_path / "mnist.npz",)


def test_places_in_order(
    tmp_path: Path,
    standard: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    named = tmp_path / "named"
    named.mkdir()
    assert find_mnist(named) == ()
    write_idx(tmp_path / "xdg" / "kfac" / "mnist", standard, packed=True)
    with caplog.at_level(logging.WARNING):
        assert find_mnist(named)[0].parent == tmp_path / "xdg" / "kfac" / "mnist"
    assert f"no MNIST files in {named}" in caplog.text
    monkeypatch.setenv("KFAC_DATA", str(tmp_path / "env"))
    write_idx(tmp_path / "env" / "MNIST" / "raw", standard, packed=False)
    assert find_mnist()[0].parent == tmp_path / "env" / "MNIST" / "raw"
    write_idx(named, standard, packed=False)
    assert find_mnist(named)[0].parent == named


def test_missing_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not in .*kfac; run 'kfac data fetch mnist'.*--data-dir.*KFAC_DATA"):
        read_mnist()
    with pytest.raises(DataError, match="does not exist"):
        read_mnist(tmp_path / "nowhere")


def test_one_file_missing_is_named(tmp_path: Path, standard: dict[str, np.ndarray]) -> None:
    write_idx(tmp_path, standard, packed=True)
    (tmp_path / FILES["y_test"].name).unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        read_mnist(tmp_path)


def test_wrong_checksum_is_refused_unless_told(tmp_path: Path, standard: dict[str, np.ndarray]) -> None:
    other = {**standard, "x_test": standard["x_test"] ^ 1}
    write_idx(tmp_path, other, packed=True)
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: wrong checksum.*problem\.verify=false"):
        read_mnist(tmp_path)
    found = read_mnist(tmp_path, verify=False)
    assert not found.verified
    assert_same(found, other)


def test_spoiled_files(tmp_path: Path, standard: dict[str, np.ndarray]) -> None:
    write_idx(tmp_path, standard, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    raw = path.read_bytes()
    for spoiled, message in ((raw[:-5], "truncated"), (b"\x7fELF" + raw[4:], "not an idx file"), (b"", "truncated")):
        path.write_bytes(spoiled)
        with pytest.raises(DataError, match=f"train-images-idx3-ubyte: {message}"):
            read_mnist(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((6, 28, 27), np.uint8)}, r"x_train has shape \(6, 28, 27\).*\(N, 28, 28\)"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, r"x_test has shape \(0, 28, 28\)"),
        ({"y_train": np.zeros(5, np.uint8)}, r"y_train has shape \(5,\) for 6 images"),
        ({"x_train": np.zeros((6, 28, 28))}, "'x_train' has dtype float64"),
        ({"y_test": np.array([0, -1, 2])}, "'y_test' has values from -1 to 2"),
        ({"y_test": np.array(["a", "b", "c"])}, "'y_test' has dtype <U1"),
    ],
)
def test_arrays_that_are_no_mnist(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "mnist.npz", **{**tiny(), **change})
    with pytest.raises(DataError, match=message):
        read_mnist(tmp_path, verify=False)


def test_npz_without_an_array(tmp_path: Path) -> None:
    arrays = tiny()
    arrays["train_x"] = arrays.pop("x_train")
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(DataError, match="has no array 'x_train'"):
        read_mnist(tmp_path)


def test_fetched_files_are_found(
    tmp_path: Path, standard: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path / "mirror", standard, packed=True)
    monkeypatch.setenv("KFAC_MIRROR", (tmp_path / "mirror").as_uri())
    paths = fetch_mnist(tmp_path / "data", (), lambda *_: None)
    assert find_mnist(tmp_path / "data") == tuple(paths)
    assert_same(read_mnist(tmp_path / "data"), standard)


def test_status(tmp_path: Path, standard: dict[str, np.ndarray]) -> None:
    missing = mnist_status()
    assert (missing.state, missing.where, missing.size) == ("missing", (), None)
    assert "kfac data fetch mnist" in missing.advice
    write_idx(tmp_path, standard, packed=False)
    right = mnist_status(tmp_path)
    assert (right.state, right.advice) == ("verified", "")
    assert right.size == sum(len(idx_bytes(array)) for array in standard.values())
    write_idx(tmp_path, {**standard, "y_test": standard["y_test"] + 1}, packed=False)
    other = mnist_status(tmp_path)
    assert other.state == "unverified"
    assert "problem.verify=false" in other.advice
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"??")
    spoiled = mnist_status(tmp_path)
    assert spoiled.state == "corrupt"
    assert "truncated" in spoiled.advice


def test_checksums_are_those_of_the_published_files() -> None:
    """The MD5 sums of the uncompressed files have been printed for decades; the real data must match both."""
    published = {
        "x_train": "6bbc9ace898e44ae57da46a324031adb",
        "y_train": "a25bea736e30d166cdddb491f175f624",
        "x_test": "2646ac647ad5339dbf082846283269ea",
        "y_test": "27ae3e4e09519cfbb04c329615203637",
    }
    assert sorted(published) == sorted(FILES)
    if find_mnist(REAL if REAL.is_dir() else None):
        real = read_mnist(REAL)
        assert real.verified
        for name, md5 in published.items():
            assert hashlib.md5(idx_bytes(getattr(real, name))).hexdigest() == md5
