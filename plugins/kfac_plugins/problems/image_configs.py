"""Config model of the problem of labelled images, and its manifest. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from kfac_plugins.problems._files import find_file, from_the_root
from kfacore.errors import KfacError
from kfacore.plugin import Component, ProblemConfig

if TYPE_CHECKING:
    from kfacore.lab.data.status import DataStatus

__all__ = ["COMPONENTS", "NO_IMAGES", "ImagesConfig"]

Count = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

NO_IMAGES = (
    "the problem 'images' needs an .npz file with images and labels, or a folder with a folder of images for each "
    "class: --set problem.file=my.npz"
)


class ImagesConfig(ProblemConfig):
    """A classifier of your own images: a small residual net, a plain convolutional net, or a vision transformer."""

    run_defaults: ClassVar[dict[str, Any]] = {
        "likelihood": {"kind": "categorical"},
        "batch": {"schedule": "constant", "start": 128, "sampling": "epochs"},
        "eval": {"cases": 2000},
    }

    kind: Literal["images"] = "images"
    """Name of the implementation."""
    file: str = ""
    """An .npz file with x_train and y_train (x_test and y_test), or images and labels; or a folder with a folder of
    images for each class, or with two such folders, train and test. A relative name is looked for in the working
    folder, then in data_dir and KFAC_DATA."""
    model: Literal["resnet", "cnn", "vit"] = "resnet"
    """The net: residual with batch norm, plain convolutional, or a vision transformer."""
    width: Count | None = None
    """Channels of the first stage, doubled twice (16 by default); numbers a patch of a vision transformer (64)."""
    depth: Count | None = None
    """Blocks of each of the three stages (1 by default); blocks of a vision transformer (4)."""
    heads: Count = 4
    """Heads of each block of a vision transformer; they must divide width."""
    patch: Count = 4
    """Height and width of a patch of a vision transformer."""
    dropout: Share = 0.0
    """Share of each branch of a vision transformer that is dropped in training."""
    size: Count = 32
    """Height and width that images from a folder are brought to."""
    channels: Literal["first", "last"] | None = None
    """Where the channels of an array are; by default told by their number, 1, 3 or 4."""
    test_share: Share = 0.1
    """Share of the images that is kept for testing where there are no test images."""

    def located(self) -> Self:
        """The file's name from the root if it is in the working folder."""
        return super().located().model_copy(update={"file": from_the_root(self.file)})

    def data_status(self) -> DataStatus:
        """Whether the named file or folder is there."""
        from kfacore.lab.data.status import DataStatus

        what = "your own images: an .npz file, or a folder of images for each class"
        if not self.file:
            return DataStatus(what, "missing", advice=NO_IMAGES)
        try:
            path = find_file(self.file, self.data_dir, needed=NO_IMAGES)
        except KfacError as error:
            return DataStatus(what, "missing", advice=str(error))
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        return DataStatus(what, "unverified", (path,), DataStatus.size_of(files))


COMPONENTS = (
    Component(
        "problem",
        "images",
        ImagesConfig,
        "kfac_plugins.problems.images:LabelledImages",
        "Classifier of your own images: ResNet, CNN or ViT.",
    ),
)
"""Manifests of this problem."""
