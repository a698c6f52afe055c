"""Data files: reading, checksums, the cache on disk, downloads, and checks before training. Imports no torch."""

from kfacore.data.checksum import sha256_of_arrays, sha256_of_file
from kfacore.data.npz import read_npz
from kfacore.data.places import cache_folder, search_folders
from kfacore.data.status import DataStatus
from kfacore.data.validation import check

__all__ = [
    "DataStatus",
    "cache_folder",
    "check",
    "read_npz",
    "search_folders",
    "sha256_of_arrays",
    "sha256_of_file",
]
