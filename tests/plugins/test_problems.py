"""The paper's autoencoders and classifier: nets, data, and what is said when data are missing."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.problems import CurvesConfig, FacesConfig, Mnist16ClassifierConfig, MnistConfig, curve_images
from kfac_plugins.problems.curve_images import curves_status, draw_curves, load_curves
from kfac_plugins.problems.curves import Curves
from kfac_plugins.problems.faces import Faces
from kfac_plugins.problems.mnist import Mnist
from kfac_plugins.problems.mnist16_classifier import Mnist16Classifier, area_downsample
from kfacore.errors import DataError
from kfacore.lab.data import check, sha256_of_arrays
from kfacore.registry import get_registry
from kfacore.roles import Problem

REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data of this machine are seen."""
    monkeypatch.setenv("KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))


@pytest.fixture(params=["tiny", *(["real"] if (REAL / "mnist.npz").is_file() else [])])
def mnist_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with MNIST: a tiny made-up one, and the real one where a developer has it."""
    if request.param == "real":
        return REAL
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    np.savez(
        folder / "mnist.npz",
        x_train=rng.integers(0, 256, (8, 28, 28), dtype=np.uint8),
        y_train=np.arange(8),
        x_test=rng.integers(0, 256, (4, 28, 28), dtype=np.uint8),
        y_test=np.arange(4) + 6,
    )
    return folder


@pytest.fixture
def few_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 60 images instead of 30,000."""
    images = draw_curves(60)
    monkeypatch.setattr(curve_images, "TRAIN_CASES", 40)
    monkeypatch.setattr(curve_images, "TEST_CASES", 20)
    monkeypatch.setattr(curve_images, "CHECKSUM", sha256_of_arrays(images[40:], images[:40]))


def widths(model: nn.Module) -> list[int]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def units(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.children() if not isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("problem", "sizes", "unit", "shape"),
    [
        (Curves(), [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784], nn.Sigmoid, (28, 28)),
        (Mnist(), [784, 1000, 500, 250, 30, 250, 500, 1000, 784], nn.Sigmoid, (28, 28)),
        (Faces(), [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625], nn.Sigmoid, (25, 25)),
        (Mnist16Classifier(), [256, 20, 20, 20, 20, 10], nn.Tanh, (16, 16)),
    ],
)
def test_nets_of_the_paper(problem: Problem, sizes: list[int], unit: type[nn.Module], shape: tuple[int, int]) -> None:
    model = problem.build_model(torch.Generator().manual_seed(0))
    assert widths(model) == sizes
    assert set(units(model)) == {unit}
    hidden = len(sizes) - 2
    assert len(units(model)) == (hidden - 1 if problem.task == "autoencoder" else hidden)
    assert isinstance(list(model.children())[-1], nn.Linear)
    assert problem.image_shape == shape
    first = next(model.parameters())
    assert first.dtype == torch.float32
    assert int((first != 0).sum(1).max()) <= 15
    again = problem.build_model(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("slot", ["problem", "likelihood"])
def test_manifests_lead_to_their_classes(slot: str) -> None:
    registry = get_registry()
    for component in registry.components(slot):
        part = registry.build(slot, component.name)
        assert type(part.config) is component.config


def test_suggested_likelihoods() -> None:
    suggested = {
        config.model_fields["kind"].default: config.run_defaults["likelihood"]["kind"]
        for config in (CurvesConfig, MnistConfig, FacesConfig, Mnist16ClassifierConfig)
    }
    assert suggested == {
        "curves": "bernoulli",
        "mnist": "bernoulli",
        "faces": "gaussian",
        "mnist16-classifier": "categorical",
    }


def test_curves_are_the_same_on_every_machine() -> None:
    images = draw_curves(curve_images.TRAIN_CASES + curve_images.TEST_CASES)
    split = curve_images.TRAIN_CASES
    assert sha256_of_arrays(images[split:], images[:split]) == curve_images.CHECKSUM
    np.testing.assert_array_equal(draw_curves(7), images[:7])
    assert len(np.unique(images, axis=0)) == len(images)


def test_curves_are_single_thin_strokes() -> None:
    images = draw_curves(300).reshape(-1, 28, 28)
    assert not images[:, [0, -1], :].any()
    assert not images[:, :, [0, -1]].any()
    assert (images.max(axis=(1, 2)) > 200).all()
    for image in images:
        assert connected(image > 0)
    # a stroke: an opening by a 7x7 square, wider than any stroke but where it meets itself, removes nearly all ink
    blocks = np.lib.stride_tricks.sliding_window_view(images > 0, (7, 7), axis=(1, 2)).all(axis=(3, 4))
    assert blocks.any(axis=(1, 2)).mean() < 0.1


def connected(ink: np.ndarray) -> bool:
    """Whether all ink can be reached from one of its pixels."""
    reached = np.zeros_like(ink)
    reached[tuple(np.argwhere(ink)[0])] = True
    while True:
        grown = reached.copy()
        for axis in (0, 1):
            grown |= np.roll(reached, 1, axis) | np.roll(reached, -1, axis)
        grown &= ink
        if (grown == reached).all():
            return bool((reached == ink).all())
        reached = grown


def test_curves_are_as_hard_as_the_original_for_a_linear_code() -> None:
    """Residual of 18 principal components, 5.90 an image in the paper that introduced the data."""
    values = draw_curves(4000) / 255.0
    values -= values.mean(axis=0)
    spectrum = np.linalg.eigvalsh(values.T @ values / len(values))
    assert spectrum[:-18].sum() == pytest.approx(5.9, abs=0.2)


@pytest.mark.usefixtures("few_curves")
def test_curves_problem_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert curves_status().state == "generated"
    data = Curves().load()
    assert data.train.targets is data.train.inputs
    assert data.test is not None
    assert (data.train.inputs.shape, data.test.inputs.shape) == ((40, 784), (20, 784))
    assert data.train.inputs.dtype == torch.float32
    check(data, Bernoulli(), 784)
    assert "original" in data.facts["regenerated"]
    path = tmp_path / "data" / "curves-v1.npz"
    assert path.is_file()
    status = curves_status()
    assert (status.state, status.where) == ("verified", (path,))
    assert "regeneration" in status.what

    def never(_: int) -> np.ndarray:
        raise AssertionError("drawn although they are on disk")

    monkeypatch.setattr(curve_images, "draw_curves", never)
    again = Curves().load()
    assert torch.equal(again.train.inputs, data.train.inputs)
    assert again.checksum == data.checksum


@pytest.mark.usefixtures("few_curves")
def test_curves_make_no_folder_that_was_named_by_mistake(tmp_path: Path) -> None:
    nowhere, mine = tmp_path / "nowhere", tmp_path / "mine"
    with pytest.raises(DataError, match="nowhere does not exist"):
        Curves(CurvesConfig(data_dir=str(nowhere))).load()
    assert not nowhere.exists()
    mine.mkdir()
    Curves(CurvesConfig(data_dir=str(mine))).load()
    assert [path.name for path in mine.iterdir()] == ["curves-v1.npz"]


@pytest.mark.usefixtures("few_curves")
def test_corrupt_curves_are_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "own").mkdir()
    train, test = load_curves(str(tmp_path / "own"))
    path = tmp_path / "own" / "curves-v1.npz"
    path.write_bytes(path.read_bytes()[:-100])
    assert curves_status(str(tmp_path / "own")).state == "corrupt"
    again, _ = load_curves(str(tmp_path / "own"))
    np.testing.assert_array_equal(again, train)
    assert "corrupt cache" in caplog.text
    # a sound file with other images is no cache of these
    np.savez(path, train=test, test=train, sha256=np.array(sha256_of_arrays(train, test)))
    assert curves_status(str(tmp_path / "own")).state == "corrupt"
    np.testing.assert_array_equal(load_curves(str(tmp_path / "own"))[0], train)
    assert curves_status(str(tmp_path / "own")).state == "verified"


@pytest.mark.usefixtures("few_curves")
def test_curves_need_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("KFAC_DATA", str(tmp_path / "blocked"))
    with caplog.at_level(logging.WARNING):
        assert len(Curves().load().train) == 40
    assert "going on without it" in caplog.text


def test_mnist_autoencoder(mnist_folder: Path) -> None:
    data = Mnist(MnistConfig(data_dir=str(mnist_folder), verify=mnist_folder == REAL)).load()
    assert data.train.targets is data.train.inputs
    assert data.test is not None
    check(data, Bernoulli(), 784)
    with np.load(mnist_folder / "mnist.npz") as archive:
        image = archive["x_train"][3].reshape(-1)
    np.testing.assert_array_equal(data.train.inputs[3].numpy(), (image / np.float32(255)).astype(np.float32))
    assert data.facts == {"standard_mnist": mnist_folder == REAL}
    assert data.source.endswith("mnist.npz")


def test_mnist16_classifier(mnist_folder: Path) -> None:
    problem = Mnist16Classifier(Mnist16ClassifierConfig(data_dir=str(mnist_folder), verify=mnist_folder == REAL))
    data = problem.load()
    assert problem.task == "classifier"
    assert data.train.inputs.shape[1] == 256
    assert data.train.targets.dtype == torch.int64
    check(data, Categorical(), 10)
    with np.load(mnist_folder / "mnist.npz") as archive:
        np.testing.assert_array_equal(data.train.targets.numpy(), archive["y_train"])
        # area averages keep the total ink
        ink = archive["x_train"].mean(axis=(1, 2)) / 255.0
    np.testing.assert_allclose(data.train.inputs.mean(1).numpy(), ink, rtol=1e-5)


def test_area_downsample_counts_cut_pixels_by_their_share() -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    # the definition: 28 and 16 divide 112, so repeat each pixel 4 times and average blocks of 7
    fine = images.repeat(4, axis=1).repeat(4, axis=2).reshape(3, 16, 7, 16, 7)
    np.testing.assert_allclose(
        area_downsample(images, 16), fine.mean(axis=(2, 4)).reshape(3, 256) / 255.0, rtol=1e-5, atol=1e-7
    )
    white = area_downsample(np.full((1, 28, 28), 255, np.uint8), 16)
    np.testing.assert_allclose(white, 1.0, rtol=1e-6)
    assert white.max() <= 1.0


@pytest.mark.parametrize("problem", [Mnist(), Mnist16Classifier()])
def test_missing_mnist(problem: Problem) -> None:
    with pytest.raises(DataError, match="kfac data fetch mnist"):
        problem.load()


def test_other_digits_need_consent(mnist_folder: Path, tmp_path: Path) -> None:
    with np.load(mnist_folder / "mnist.npz") as archive:
        arrays = {name: archive[name][:5] for name in archive.files}
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(DataError, match=r"problem\.verify=false"):
        Mnist(MnistConfig(data_dir=str(tmp_path))).load()
    assert len(Mnist(MnistConfig(data_dir=str(tmp_path), verify=False)).load().train) == 5
