"""A user's own function: finding, importing and calling it; what goes wrong is told with the line of the user's file.

Whatever it draws from the global generators of torch, numpy and Python is fixed by a seed, and leaves them as they
were.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import random
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch

from kfacore.errors import ConfigError, KfacError, nearest
from kfacore.host import seed_generators

__all__ = ["call", "find_function", "seeded"]

_ADVICE = "write module:function or folder/file.py:function"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from the global generators depend on the seed inside, and on nothing of it outside."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def find_function(target: str, folder: str | None) -> Callable[..., Any]:
    """Import a function.

    Args:
        target: ``module:function`` or ``folder/file.py:function``.
        folder: From which a module is imported and a relative file is meant; None for the working folder.

    Raises:
        ConfigError: There is no such module or function, or importing it fails; the message has the user's line.
    """
    module_name, colon, name = target.rpartition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"problem.target = {target!r} names no function; {_ADVICE}")
    root = Path(folder or "").expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(f"problem.folder {root} is not a folder; name the one that holds {module_name}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # for good: a function may import its neighbours when it is called
    module = _file_module(root, module_name, target) if module_name.endswith(".py") else _module(root, module_name)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ConfigError(
                f"{target}: {_place(module)} has no function '{name}'; {nearest(name, own) or 'it has none at all'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{target}: '{name}' of {_place(module)} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def call(function: Callable[..., Any], arguments: Mapping[str, Any], target: str, folder: str | None) -> Any:
    """Call it.

    Args:
        function: The function.
        arguments: By name.
        target: What the user wrote, for messages.
        folder: Where the user's files are, for messages.

    Raises:
        ConfigError: It does not take these arguments, or it fails; the message has the user's file and line.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{target}: problem.arguments do not fit the function: {error}") from error
    except ValueError:  # one of those written in C, which do not tell
        pass
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        _refuse(error, target, folder)


def _module(root: Path, name: str) -> ModuleType:
    """A module by its name, which must be the one in the folder if there is one."""
    top = name.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, [str(root)])
    taken = sys.modules.get(top)
    if spec is not None and spec.origin and taken is not None and getattr(taken, "__file__", None) != spec.origin:
        other = getattr(taken, "__file__", None) or "built in"
        raise ConfigError(
            f"{name}: Python has another module of the name '{top}' ({other}); "
            f"write {top}.py:function, or rename {spec.origin}"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"there is no module '{name}' in {root} or among the installed ones; {_ADVICE}, from the folder that "
                "holds it or with problem.folder"
            ) from error
        _refuse(error, name, str(root))
    except (Exception, SystemExit) as error:
        _refuse(error, name, str(root))


def _file_module(root: Path, file: str, target: str) -> ModuleType:
    """The module in a file, under a name of its own."""
    path = (root / Path(file).expanduser()).resolve()
    if not path.is_file():
        raise ConfigError(f"{target}: there is no file {path}; {_ADVICE}")
    name = f"kfac_problem_{path.stem}_{zlib.crc32(str(path).encode()):x}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{target}: {path} cannot be imported; {_ADVICE}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        _refuse(error, target, str(path.parent))
    return module


def _refuse(error: BaseException, target: str, folder: str | None) -> NoReturn:
    """Say where in the user's file something went wrong, and what."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    what = lines[-1] if lines else type(error).__name__
    if isinstance(error, SystemExit):
        what = "it ends the program (sys.exit); put what a script does under if __name__ == '__main__'"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    else:
        place = _last_line(error, Path(folder or "").expanduser().absolute())
    kind = type(error) if isinstance(error, KfacError) else ConfigError
    said = str(error) if isinstance(error, KfacError) else what
    raise kind(f"{target}: {place}: {said}") from error


def _last_line(error: BaseException, folder: Path) -> str:
    """The innermost line of the user's own files, else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(folder) and "site-packages" not in Path(frame.filename).parts
    ]
    foreign = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    chosen = (own or foreign or list(frames))[-1]
    where = "" if chosen.name == "<module>" else f", in {chosen.name}"
    return f"{chosen.filename}, line {chosen.lineno}{where}"


def _place(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)
