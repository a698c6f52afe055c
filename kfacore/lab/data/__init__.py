"""Data files: reading, checksums, the cache on disk, downloads, and checks before training. Imports no torch."""

from kfacore.lab.data.checksum import sha256_of_arrays, sha256_of_file
from kfacore.lab.data.npz import read_npz
from kfacore.lab.data.places import cache_folder, search_folders
from kfacore.lab.data.status import DataStatus
from kfacore.lab.data.validation import check

__all__ = [
    "DataStatus",
    "cache_folder",
    "check",
    "read_npz",
    "search_folders",
    "sha256_of_arrays",
    "sha256_of_file",
]
