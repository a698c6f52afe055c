"""A problem made of a user's own arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from kfac_plugins.problems import NpzConfig
from kfac_plugins.problems._splits import autoencoder_split
from kfac_plugins.problems.npz_file import Arrays, find_npz, read_arrays
from kfacore.errors import ResourceError
from kfacore.lab.data.checksum import sha256_of_arrays
from kfacore.lab.models import mlp, sparse_init
from kfacore.roles import Problem, ProblemData, Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Npz"]


class Npz(Problem):
    """A feed-forward net, sparsely initialised, on arrays from one .npz file.

    Arrays: ``x_train`` (N, ...), flattened to one row a case; ``y_train`` (N,) class numbers, or (N, k) or (N,) real
    numbers, or none for an autoencoder; ``x_test`` and ``y_test`` likewise, if there is anything to test on. Values
    are taken as they are.
    """

    Config: ClassVar[type[NpzConfig]] = NpzConfig
    config: NpzConfig

    def __init__(self, config: NpzConfig | None = None) -> None:
        super().__init__(config)
        self._arrays: Arrays | None = None

    @property
    def arrays(self) -> Arrays:
        """The checked arrays, read on first use.

        Raises:
            ConfigError: No file is named.
            DataError: The file is missing or something is wrong with its arrays.
        """
        if self._arrays is None:
            config = self.config
            self._arrays = read_arrays(find_npz(config.file, config.data_dir), config.task, config.classes)
        return self._arrays

    # What the other problems know beforehand comes from the file here.
    @property
    def task(self) -> Literal["autoencoder", "classifier", "regression"]:  # type: ignore[override]  # read-only here
        """What is learned, as the configuration says or ``y_train`` suggests."""
        return self.arrays.task

    @property
    def image_shape(self) -> tuple[int, int] | None:  # type: ignore[override]  # read-only here
        """(height, width) if the cases in the file are matrices."""
        shape = self.arrays.case_shape
        return (shape[0], shape[1]) if len(shape) == 2 else None

    def load(self) -> ProblemData:
        """Read and check the file."""
        arrays = self.arrays
        parts = (arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test)
        return ProblemData(
            train=_split(arrays.x_train, arrays.y_train),
            test=None if arrays.x_test is None else _split(arrays.x_test, arrays.y_test),
            checksum=sha256_of_arrays(*(part for part in parts if part is not None)),
            source=str(arrays.source),
            facts={"task": arrays.task, "outputs": arrays.outputs},
        )

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """Input width, ``sizes`` of the configuration, output width; sparsely initialised.

        Raises:
            ConfigError: ``code_layer`` is not the number of a hidden layer.
            ResourceError: The net is larger than the machine.
        """
        config, arrays = self.config, self.arrays
        sizes = (arrays.x_train.shape[1], *config.sizes, arrays.outputs)
        _require_memory(sizes)
        model = mlp(sizes, config.hidden, linear=() if config.code_layer is None else (config.code_layer,))
        sparse_init(model, generator)
        return model


def _require_memory(sizes: Sequence[int]) -> None:
    """Refuse a net whose parameters alone do not fit into this machine, before it is tried.

    Raises:
        ResourceError: It says how much is needed.
    """
    needed = 4 * sum((a + 1) * b for a, b in pairwise(sizes))
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return
    if needed > there // 2:
        raise ResourceError(
            f"a net of widths {', '.join(map(str, sizes))} has {needed / 1e9:.1f} GB of parameters, this machine "
            f"{there / 1e9:.1f} GB of memory; choose smaller problem.sizes, or fewer classes"
        )


def _split(inputs: NDArray[np.float32], targets: NDArray[Any] | None) -> Split:
    if targets is None:
        return autoencoder_split(inputs)
    return Split(torch.from_numpy(inputs), torch.from_numpy(targets))
