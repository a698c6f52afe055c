"""``python -m benchmarks.gpu``: see `benchmarks.gpu.command`."""

from __future__ import annotations

import sys

from benchmarks.gpu.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
