"""Reading .npz files of unknown origin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kfacore.errors import DataError
from kfacore.lab.data import read_npz


def test_reads_what_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x_train=np.ones(2), y_train=np.zeros(3), other=np.array(["text"]))
    assert sorted(read_npz(path)) == ["other", "x_train", "y_train"]
    assert sorted(read_npz(path, required=("x_train",), optional=("y_train", "x_test"))) == ["x_train", "y_train"]
    assert sorted(read_npz(path, required=("x_train",), optional=())) == ["x_train"]


class Bomb:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x_train=np.array([Bomb(tmp_path / "exploded")], dtype=object))
    with pytest.raises(DataError, match="array 'x_train' holds Python objects"):
        read_npz(path)
    assert not (tmp_path / "exploded").exists()


def test_missing_array_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, X_train=np.ones(2), labels=np.ones(2))
    with pytest.raises(DataError, match="has no array 'x_train'; did you mean 'X_train'"):
        read_npz(path, required=("x_train",))
    np.savez(path)
    with pytest.raises(DataError, match="the file is empty"):
        read_npz(path, required=("x_train",))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_npz(tmp_path / "d.npz")
    with pytest.raises(DataError, match="is a folder"):
        read_npz(tmp_path)
    text = tmp_path / "text.npz"
    text.write_text("x_train,y_train\n1,2\n")
    with pytest.raises(DataError, match=r"not a \.npz file, or corrupt"):
        read_npz(text)
    (tmp_path / "nothing.npz").touch()
    with pytest.raises(DataError, match=r"not a \.npz file, or corrupt"):
        read_npz(tmp_path / "nothing.npz")
    single = tmp_path / "single.npy"
    np.save(single, np.ones(3))
    with pytest.raises(DataError, match=r"single \.npy array.*numpy\.savez"):
        read_npz(single)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated(tmp_path: Path, compressed: bool, keep: float) -> None:
    path = tmp_path / "d.npz"
    write = np.savez_compressed if compressed else np.savez
    write(path, x_train=np.random.default_rng(0).random(500))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(DataError, match="corrupt or truncated"):
        read_npz(path)


@pytest.mark.parametrize("compressed", [True, False])
def test_every_flipped_byte_of_the_data_is_noticed_or_harmless(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "d.npz"
    array = np.random.default_rng(0).random(40)
    (np.savez_compressed if compressed else np.savez)(path, x_train=array)
    raw = path.read_bytes()
    noticed = 0
    for position in range(0, len(raw), 3):
        spoiled = bytearray(raw)
        spoiled[position] ^= 0x5A
        path.write_bytes(spoiled)
        try:
            read = read_npz(path, required=("x_train",))
        except DataError:
            noticed += 1
        else:
            np.testing.assert_array_equal(read["x_train"], array)
    assert noticed > len(raw) // 12
