"""A user's own .npz or .csv file: finding it and checking its arrays. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kfac_plugins.problems._files import find_file
from kfacore.errors import ConfigError, DataError
from kfacore.lab.data.infer import FEW_CLASSES, are_classes, likelihood_of
from kfacore.lab.data.npz import read_npz
from kfacore.lab.data.status import DataStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Arrays", "Task", "find_npz", "labels_of", "npz_status", "read_arrays", "read_csv", "suggested_likelihood"]

Task = Literal["autoencoder", "classifier", "regression"]

_WHAT = "your own arrays: x_train, and y_train, x_test, y_test as needed"
_LARGEST = 2**62
"""No class number is larger; unsigned ones may be beyond int64."""

_NO_FILE = "the problem 'npz' needs a file: --set problem.file=data.npz"


@dataclass(frozen=True)
class Arrays:
    """Checked arrays.

    Attributes:
        task: What is learned.
        case_shape: Shape of one case in the file.
        x_train: (N, d) float32.
        y_train: (N,) int64 class numbers, (N, k) float32, or None for an autoencoder.
        x_test: (M, d), or None.
        y_test: Like ``y_train``.
        outputs: Outputs the model needs.
        source: The file.
    """

    task: Task
    case_shape: tuple[int, ...]
    x_train: NDArray[np.float32]
    y_train: NDArray[Any] | None
    x_test: NDArray[np.float32] | None
    y_test: NDArray[Any] | None
    outputs: int
    source: Path


def find_npz(file: str, data_dir: str | None) -> Path:
    """The file itself, or a relative name below ``data_dir`` or ``KFAC_DATA``.

    Raises:
        ConfigError: No file is named.
        DataError: It is in none of these folders.
    """
    return find_file(file, data_dir, needed=_NO_FILE)


def read_arrays(path: Path, task: Task | None, classes: int | None) -> Arrays:
    """Read and check a file.

    Args:
        path: The file.
        task: What is learned, or None to infer it from ``y_train``.
        classes: Number of classes, or None for the largest training label plus one.

    Raises:
        DataError: An array is missing, empty, not numeric, not finite, of the wrong shape or dtype, counts do not
            match, or a label is out of range or no class number at all.
    """
    if path.suffix.lower() == ".csv":
        raw = read_csv(path)
    else:
        raw = read_npz(path, required=("x_train",), optional=("y_train", "x_test", "y_test"))
    _check_pairs(raw, path)
    task = task or _infer(raw)
    if task != "autoencoder" and "y_train" not in raw:
        raise DataError(f"{path}: has no array 'y_train', which a {task} needs")
    if classes is not None and task != "classifier":
        raise ConfigError(f"problem.classes={classes} is for a classifier, but {path.name} is used for a {task}")
    x_train = _inputs(raw["x_train"], f"{path}: array 'x_train'")
    x_test = _inputs(raw["x_test"], f"{path}: array 'x_test'") if "x_test" in raw else None
    y_train: NDArray[Any] | None = None
    y_test: NDArray[Any] | None = None
    outputs = x_train.shape[1]
    if task == "classifier":
        y_train = _labels(raw["y_train"], f"{path}: array 'y_train'", classes)
        outputs = classes or _count_classes(y_train, f"{path}: array 'y_train'")
        if x_test is not None:
            y_test = _labels(raw["y_test"], f"{path}: array 'y_test'", outputs)
    elif task == "regression":
        y_train = _outputs(raw["y_train"], f"{path}: array 'y_train'")
        outputs = y_train.shape[1]
        if x_test is not None:
            y_test = _outputs(raw["y_test"], f"{path}: array 'y_test'")
            if y_test.shape[1] != outputs:
                raise DataError(f"{path}: y_test has {y_test.shape[1]} columns, y_train has {outputs}; both must agree")
    return Arrays(task, raw["x_train"].shape[1:], x_train, y_train, x_test, y_test, outputs, path)


def suggested_likelihood(path: Path, task: Task | None) -> tuple[str, str]:
    """The likelihood that the file's training targets suggest, and one line that says why.

    Raises:
        DataError: The file cannot be read.
    """
    import numpy as np

    name = "y_train" if task != "autoencoder" else "x_train"
    raw = read_csv(path) if path.suffix.lower() == ".csv" else read_npz(path, optional=(name,))
    if name not in raw and task is None:  # an autoencoder
        name = "x_train"
        raw = read_npz(path, optional=(name,))
    if name not in raw or not raw[name].size:  # `load` says what is wrong
        return "gaussian", ""
    y = raw[name]
    if y.dtype.kind not in "fuib":  # likewise
        return "gaussian", ""
    if (task or _infer({"y_train": y} if name == "y_train" else {})) == "classifier":
        if task is None and not are_classes(y):  # quantities or ids: the likelihood's check says what to do
            return "gaussian", ""
        kind, why = "categorical", f"integers, {len(np.unique(y))} distinct ones"
    elif y.dtype.kind in "uib":
        kind, why = likelihood_of(y.astype(np.float32))
    else:
        kind, why = likelihood_of(y)
    return kind, f"{path}: {name} holds {why}, so the likelihood is {kind} (--set likelihood=NAME chooses another)"


def read_csv(path: Path) -> dict[str, NDArray[Any]]:
    """``x_train`` and ``y_train`` from a table of numbers separated by commas; the last column is the target.

    A first line with words is skipped. A last column of whole numbers that look like class numbers is read as classes.

    Raises:
        DataError: It is no such table.
    """
    import numpy as np

    try:
        with path.open(encoding="utf-8-sig") as file:
            header = not all(_is_number(word) for word in file.readline().split(","))
            table = np.loadtxt(file if header else path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(
            f"{path}: not a table of numbers separated by commas ({error}); leave out columns of words, or store "
            "arrays with numpy.savez"
        ) from error
    if table.shape[0] < 1 or table.shape[1] < 2:
        raise DataError(
            f"{path}: has {table.shape[0]} rows and {table.shape[1]} columns; needed are inputs and a target"
        )
    x, y = table[:, :-1], table[:, -1]
    whole = bool((y == np.rint(y)).all()) and bool(np.isfinite(y).all()) and np.abs(y).max() < 2**53
    if whole and are_classes(y.astype(np.int64)):
        y = y.astype(np.int64)
    return {"x_train": x, "y_train": y}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def npz_status(file: str, data_dir: str | None) -> DataStatus:
    """Whether the named file is there, for ``kfac data list``."""
    if not file:
        return DataStatus(_WHAT, "missing", advice=_NO_FILE)
    try:
        path = find_npz(file, data_dir)
    except DataError as error:
        return DataStatus(_WHAT, "missing", advice=str(error))
    return DataStatus(_WHAT, "unverified", (path,), DataStatus.size_of([path]))


def labels_of(array: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Class numbers from 0 on, (N,) int64, most of them occurring.

    Raises:
        DataError: They are no integers, negative, or look like ids.
    """
    labels = _labels(array, where, None)
    _count_classes(labels, where)
    return labels


def _check_pairs(raw: dict[str, NDArray[Any]], path: Path) -> None:
    """Arrays that belong together are there and have the same number of cases."""
    if "y_test" in raw and "x_test" not in raw:
        raise DataError(f"{path}: has y_test but no x_test; give both or none")
    if "y_train" in raw and "x_test" in raw and "y_test" not in raw:
        raise DataError(f"{path}: has y_train and x_test but no y_test; add it, or leave out x_test")
    if "y_test" in raw and "y_train" not in raw:
        raise DataError(f"{path}: has y_test but no y_train; give both or none")
    for name, array in raw.items():
        if array.ndim == 0 or array.size == 0:
            raise DataError(f"{path}: array '{name}' is empty, shape {array.shape}; give at least one example")
    for part in ("train", "test"):
        if f"y_{part}" in raw and len(raw[f"y_{part}"]) != len(raw[f"x_{part}"]):
            raise DataError(
                f"{path}: x_{part} has {len(raw[f'x_{part}'])} examples, y_{part} has {len(raw[f'y_{part}'])}; each "
                "example needs one target"
            )
    if "x_test" in raw and raw["x_test"].shape[1:] != raw["x_train"].shape[1:]:
        raise DataError(
            f"{path}: examples of x_test have shape {raw['x_test'].shape[1:]}, those of x_train "
            f"{raw['x_train'].shape[1:]}; both must agree"
        )


def _count_classes(labels: NDArray[np.int64], where: str) -> int:
    """The largest label plus one, unless most of these classes would be empty: labels are then something else.

    Raises:
        DataError: They look like ids, years or prices.
    """
    import numpy as np

    classes, distinct = int(labels.max()) + 1, len(np.unique(labels))
    if classes > max(FEW_CLASSES, 2 * distinct):
        raise DataError(
            f"{where} holds {distinct} distinct class numbers, the largest {classes - 1}: most of {classes:,} classes "
            "would be empty. If they are ids, renumber them, for example with numpy.unique(y, return_inverse=True) on "
            "all labels together; if they are quantities (prices, counts), set problem.task=regression; if there are "
            f"so many classes, set problem.classes={classes}"
        )
    return max(2, classes)


def _infer(raw: dict[str, NDArray[Any]]) -> Task:
    if "y_train" not in raw:
        return "autoencoder"
    return "classifier" if raw["y_train"].dtype.kind in "uib" else "regression"


def _inputs(array: NDArray[Any], where: str) -> NDArray[np.float32]:
    """One float32 row a case: (N, ...) -> (N, d); (N,) are N cases of one number."""
    return _real(array.reshape(len(array), -1), where)


def _outputs(array: NDArray[Any], where: str) -> NDArray[np.float32]:
    """Regression targets, one column an output: (N,) -> (N, 1)."""
    return _real(array.reshape(len(array), -1), where)


def _real(array: NDArray[Any], where: str) -> NDArray[np.float32]:
    import numpy as np

    if array.dtype.kind not in "fuib":
        raise DataError(f"{where} has dtype {array.dtype}; needed are real numbers{_number_words(array, where)}")
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite and are reported as such
        values = array.astype(np.float32)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(
            f"{where}: {int(bad.sum())} of {len(values)} examples hold NaN, infinity or numbers beyond float32, the "
            f"first is example {int(bad.argmax())}; remove or repair them"
        )
    return values


def _number_words(array: NDArray[Any], where: str) -> str:
    """What to do with labels that are words."""
    if array.dtype.kind not in "US" or "y_" not in where:
        return ""
    return "; number words with numpy.unique(labels, return_inverse=True)[1] on all labels together"


def _labels(array: NDArray[Any], where: str, classes: int | None) -> NDArray[np.int64]:
    """Class numbers, (N,) or (N, 1) -> (N,) int64."""
    import numpy as np

    if array.dtype.kind not in "uib":
        advice = _number_words(array, where) or " (or set problem.task=regression)"
        raise DataError(f"{where} has dtype {array.dtype}; a classifier needs integer class numbers{advice}")
    if array.shape not in ((len(array),), (len(array), 1)):
        raise DataError(
            f"{where} has shape {array.shape}; a classifier needs one class number an example, shape ({len(array)},); "
            "from one-hot rows take .argmax(1), or set problem.task=regression if they are quantities"
        )
    labels = array.reshape(-1)
    top = "" if classes is None else f" to {classes - 1}"
    wrong = (labels < 0) | (labels > _LARGEST if classes is None else labels >= classes)
    if wrong.any():
        first = int(wrong.argmax())
        raise DataError(
            f"{where}: class numbers must be 0{top or ' or more'}, found {labels[first]} at example {first} and "
            f"{int(wrong.sum())} such examples in all; renumber the classes{' or set problem.classes' if top else ''}"
        )
    return labels.astype(np.int64)
