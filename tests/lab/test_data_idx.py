"""The idx format."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from kfacore.errors import DataError
from kfacore.lab.data.idx import idx_bytes, parse_idx, uncompressed

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_layout_is_the_published_one() -> None:
    raw = idx_bytes(IMAGES)
    assert raw[:16] == bytes.fromhex("00000803 00000002 00000003 00000004")
    assert raw[16:] == bytes(range(24))


@pytest.mark.parametrize("array", [IMAGES, np.array([7, 255], dtype=np.uint8), np.zeros((0, 28, 28), dtype=np.uint8)])
def test_round_trip_plain_and_compressed(tmp_path: Path, array: np.ndarray) -> None:
    plain, packed = tmp_path / "file", tmp_path / "file.gz"
    plain.write_bytes(idx_bytes(array))
    packed.write_bytes(gzip.compress(idx_bytes(array), mtime=0))
    for path in (plain, packed):
        read = parse_idx(uncompressed(path), path.name)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)
        assert read.shape == array.shape


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated, only 0 bytes"),
        (b"\0\0\x08", "truncated, only 3 bytes"),
        (b"\0\0\x08\x03\0\0\0\x02", "truncated in the header"),
        (idx_bytes(IMAGES)[:-1], r"truncated, 39 bytes where the header's shape \(2, 3, 4\) needs 40"),
        (idx_bytes(IMAGES) + b"\0", "too long, 41 bytes"),
        (b"PK\x03\x04" + bytes(60), "not an idx file.*504b0304.*00000803"),
        (b"\0\0\x0d\x03" + struct.pack(">III", 1, 1, 1) + bytes(4), "unsigned bytes.*00000d03"),
        (b"\0\0\x08\x00" + bytes(4), "00000800"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0), r"must end in \.gz"),
    ],
)
def test_what_is_wrong_is_said(raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"^train-images: .*{message}"):
        parse_idx(raw, "train-images")


def test_gzip_files_that_are_spoiled(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    packed = gzip.compress(idx_bytes(IMAGES), mtime=0)
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # in the checksum of gzip
    for raw in (packed[:-9], bytes(flipped), b"not gzip at all", packed[:12], b"\x1f\x8b"):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"labels\.gz: corrupt or truncated gzip file"):
            uncompressed(path)
    with pytest.raises(DataError, match="cannot be read"):
        uncompressed(tmp_path / "none.gz")
