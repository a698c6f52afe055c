"""Autoencoders: the paper's where their images can be had, and small ones that stand in for them."""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch

from benchmarks.robust.bundled import digits, digits_28
from benchmarks.robust.task import Array, Problem, Task, net, split, values
from kfacore.errors import KfacError
from kfacore.registry import get_registry

__all__ = ["AUTOENCODERS"]

CASES = 2000
"""Training images of the paper's problems: what a run of seconds sees."""


@cache
def _curves() -> Array:
    from kfac_plugins.problems.curve_images import draw_curves

    return draw_curves(CASES + 500) / 255.0


def _curves_task(seed: int) -> Task:
    """The paper's net, sparsely initialised, on the first of the generated images."""
    model = get_registry().build("problem", "curves").build_model(torch.Generator().manual_seed(seed))
    images = _curves()
    return values(model, split(seed, images, images, train=CASES), 250, "bernoulli")


def _from_file(name: str, likelihood: str, seed: int) -> Task:
    """One of the paper's problems that needs its file; random cases of it."""
    problem = get_registry().build("problem", name)
    data = problem.load()
    random = torch.Generator().manual_seed(seed)
    model = problem.build_model(random)
    assert data.test is not None
    train = torch.randperm(len(data.train.inputs), generator=random)[:CASES]
    test = torch.randperm(len(data.test.inputs), generator=random)[:500]
    x, x_test = data.train.inputs[train], data.test.inputs[test]
    return Task(model, x, x, x_test, x_test, likelihood, 250)


@cache
def _no_file(name: str) -> str | None:
    """Why a problem's file cannot be used; only a folder that ``KFAC_DATA`` names is looked into."""
    if "KFAC_DATA" not in os.environ:
        return "KFAC_DATA names no folder with its images"
    try:
        get_registry().build("problem", name).load()
    except KfacError as error:
        return str(error)
    return None


def _digits_bernoulli(seed: int) -> Task:
    x, _ = digits()
    return values(net((64, 128, 32, 8, 32, 128, 64), "logistic", seed), split(seed, x, x), 100, "bernoulli")


def _digits_gaussian(seed: int) -> Task:
    x, _ = digits()
    return values(net((64, 100, 30, 100, 64), "relu", seed), split(seed, x, x), 100)


def _digits_28(seed: int) -> Task:
    x = digits_28()
    return values(net((784, 250, 100, 30, 100, 250, 784), "tanh", seed), split(seed, x, x), 250, "bernoulli")


def _patches(seed: int) -> Task:
    """Smooth random 25x25 images, standing in for FACES: waves that are rarer the shorter they are."""
    random = np.random.default_rng(seed)
    wave = np.cos(np.pi * np.outer(np.arange(25) + 0.5, np.arange(6)) / 25.0)
    weight = 1.0 / (1.0 + np.add.outer(np.arange(6), np.arange(6)))
    images = wave @ (weight * random.standard_normal((2500, 6, 6))) @ wave.T
    x = images.reshape(len(images), -1)
    return values(net((625, 200, 100, 30, 100, 200, 625), "logistic", seed), split(seed, x, x), 250)


AUTOENCODERS = [
    Problem("curves", "autoencoder", _curves_task),
    Problem("digits-autoencoder", "autoencoder", _digits_bernoulli),
    Problem("digits-autoencoder-gaussian", "autoencoder", _digits_gaussian),
    Problem("digits-28-autoencoder", "autoencoder", _digits_28),
    Problem("patches-autoencoder", "autoencoder", _patches),
    Problem("mnist", "autoencoder", lambda seed: _from_file("mnist", "bernoulli", seed), lambda: _no_file("mnist")),
    Problem("faces", "autoencoder", lambda seed: _from_file("faces", "gaussian", seed), lambda: _no_file("faces")),
]
