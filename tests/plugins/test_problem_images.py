"""The problem of labelled images: the suite, arrays and folders, and what is said when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kfac_plugins.problems.image_configs import ImagesConfig
from kfac_plugins.problems.images import LabelledImages
from kfacore.errors import ConfigError, DataError
from kfacore.testing import ProblemSuite

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (24, 3, 8, 8), dtype=np.uint8)
LABELS = np.arange(24) % 3


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KFAC_DATA", raising=False)


def problem(folder: Path, arrays: dict[str, Any], **options: object) -> LabelledImages:
    np.savez(folder / "i.npz", **arrays)
    return LabelledImages(ImagesConfig.model_validate({"file": str(folder / "i.npz"), **options}))


class _Suite(ProblemSuite):
    name = "images"
    reads_files = True
    sizes_from_data = True
    model_name = "resnet"

    def data(self, folder: Path) -> dict[str, Any]:
        np.savez(folder / "i.npz", images=BYTES, labels=LABELS)
        sizes = {"width": 8, "depth": 1, "heads": 2} if self.model_name == "vit" else {"width": 4}
        return {"file": str(folder / "i.npz"), "model": self.model_name, **sizes}


class TestResidual(_Suite):
    pass


class TestConvolutional(_Suite):
    model_name = "cnn"


class TestTransformer(_Suite):
    model_name = "vit"


del _Suite


def test_bytes_are_standardised_by_channel(tmp_path: Path) -> None:
    arrays = {"x_train": BYTES, "y_train": LABELS, "x_test": BYTES[:5], "y_test": LABELS[:5]}
    data = problem(tmp_path, arrays).load()
    assert data.test is not None
    assert torch.equal(data.test.inputs, data.train.inputs[:5])
    assert torch.allclose(data.train.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(data.train.inputs.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    assert data.facts == {"classes": 3, "shape": [3, 8, 8]}


def test_test_images_are_chosen_once_for_all(tmp_path: Path) -> None:
    data = problem(tmp_path, {"images": BYTES, "labels": LABELS}, test_share=0.25).load()
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (18, 6)
    assert problem(tmp_path, {"images": BYTES, "labels": LABELS}, test_share=0.0).load().test is None


@pytest.mark.parametrize(
    ("images", "options", "shape"),
    [
        (BYTES[:, 0], {}, [1, 8, 8]),
        (np.moveaxis(BYTES, 1, 3), {}, [3, 8, 8]),
        (BYTES[:, :, :3, :3], {"channels": "first"}, [3, 3, 3]),
        (np.moveaxis(BYTES, 1, 3) / 255.0, {"channels": "last"}, [3, 8, 8]),
    ],
)
def test_layouts(tmp_path: Path, images: np.ndarray, options: dict[str, Any], shape: list[int]) -> None:
    assert problem(tmp_path, {"images": images, "labels": LABELS}, **options).load().facts["shape"] == shape


def folder_of_images(folder: Path, size: int = 12) -> None:
    for number, name in enumerate(("cats", "dogs")):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("not an image")
        for index in range(3):
            Image.new("RGB", (size, size + index), (200 * number, 0, 50)).save(folder / name / f"{index}.png")


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "pets")
    made = LabelledImages(ImagesConfig.model_validate({"file": str(tmp_path / "pets"), "size": 8, "test_share": 0.0}))
    data = made.load()
    assert data.train.inputs.shape == (6, 3, 8, 8)
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert made.images.x_train[:, :, 0, 0].tolist() == [[0, 0, 50]] * 3 + [[200, 0, 50]] * 3
    for part in ("train", "test"):
        folder_of_images(tmp_path / "split" / part)
    whole = LabelledImages(ImagesConfig.model_validate({"file": str(tmp_path / "split"), "size": 8})).load()
    assert whole.test is not None
    assert len(whole.test) == 6
    (tmp_path / "pets" / "cats" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png: not a readable image"):
        LabelledImages(ImagesConfig.model_validate({"file": str(tmp_path / "pets")})).load()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": BYTES}, "needed are the arrays x_train and y_train, or images and labels; found pictures"),
        ({"images": BYTES, "labels": LABELS[:9]}, "24 images in 'images', 9 labels"),
        ({"images": BYTES, "labels": LABELS * 1000}, "most of 2,001 classes would be empty"),
        ({"images": BYTES[:, :, :3, :3], "labels": LABELS}, r"problem\.channels=first or last"),
        ({"images": BYTES[:, 0, 0], "labels": LABELS}, r"has shape \(24, 8\)"),
        ({"images": np.full((24, 8, 8), np.nan), "labels": LABELS}, "NaN or infinity"),
        ({"images": BYTES.astype(np.uint16), "labels": LABELS}, "dtype uint16"),
        ({"x_train": BYTES, "y_train": LABELS, "x_test": BYTES}, "only one of x_test and y_test"),
        ({"x_train": BYTES, "y_train": LABELS, "x_test": BYTES[:, :, 1:], "y_test": LABELS}, "both must agree"),
        (
            {"x_train": BYTES[::3], "y_train": LABELS[::3], "x_test": BYTES, "y_test": LABELS},
            "a test image is of class 2",
        ),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        problem(tmp_path, arrays).load()


def test_a_patch_must_divide_the_image(tmp_path: Path) -> None:
    made = problem(tmp_path, {"images": BYTES, "labels": LABELS}, model="vit", patch=3)
    with pytest.raises(ConfigError, match=r"8 x 8 cannot be cut into patches of 3 x 3"):
        made.build_model(torch.Generator())
