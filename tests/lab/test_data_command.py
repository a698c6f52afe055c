"""`kfac data list` and `kfac data fetch`, run as the command is run."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kfac_cli import main as entry
from kfacore.lab.data import mnist
from kfacore.lab.data.fetch import RemoteFile
from kfacore.lab.data.idx import idx_bytes
from kfacore.registry import reset_registry

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data of this machine are seen."""
    monkeypatch.delenv("KFAC_DATA", raising=False)
    monkeypatch.delenv("KFAC_MIRROR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
    reset_registry()


@pytest.fixture
def kfac(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kfac", *arguments])
        with pytest.raises(SystemExit) as left:
            entry.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four tiny files that count as MNIST."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = {}
    for name, file in mnist.FILES.items():
        count = 3 if name.endswith("train") else 2
        shape = (count, 28, 28) if name.startswith("x") else (count,)
        content = idx_bytes(rng.integers(0, 10, shape, dtype=np.uint8))
        (folder / file.name).write_bytes(gzip.compress(content))
        files[name] = RemoteFile(file.name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(mnist, "FILES", files)
    return folder


def test_list_says_what_is_missing_and_how_to_get_it(kfac: Run, tmp_path: Path) -> None:
    code, out, _ = kfac("data", "list")
    assert code == 0
    assert "a regeneration, not the original file" in out
    assert "run 'kfac data fetch mnist'" in out
    assert "run 'kfac data fetch faces'" in out
    assert f"folders searched: {tmp_path / 'xdg' / 'kfac'}" in out


def test_list_imports_no_torch() -> None:
    program = "import sys; sys.argv[1:] = ['data', 'list']\nfrom kfac_cli.main import main\n"
    program += "try: main()\nfinally: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


def test_list_as_json(kfac: Run, mirror: Path) -> None:
    code, out, err = kfac("data", "list", "--data-dir", str(mirror), "--json")
    assert (code, err) == (0, "")
    found = {entry["problem"]: entry for entry in json.loads(out)}
    assert " ".join(sorted(found)) == "curves faces images mnist mnist16-classifier npz python shakespeare text"
    assert found["curves"]["state"] == "generated"
    assert found["faces"] == {**found["faces"], "state": "missing", "files": [], "bytes": None}
    assert found["mnist"]["state"] == "verified"
    assert found["mnist"]["bytes"] == sum(path.stat().st_size for path in mirror.iterdir())
    assert len(found["mnist"]["files"]) == 4


def test_list_finds_spoiled_files(kfac: Run, mirror: Path) -> None:
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(b"??")
    code, out, _ = kfac("data", "list", "--data-dir", str(mirror))
    assert code == 0
    assert "there, but unusable" in out
    assert "corrupt or truncated gzip" in out


def test_fetch_then_list(kfac: Run, mirror: Path, tmp_path: Path) -> None:
    fetch = partial(kfac, "data", "fetch", "mnist", "--mirror", mirror.as_uri())
    code, out, err = fetch("--data-dir", str(tmp_path / "new"))
    assert code == 0
    assert [Path(line).parent for line in out.splitlines()] == [tmp_path / "new" / "mnist"] * 4
    assert err.count("fetching ") == 4
    code, out, err = fetch("--data-dir", str(tmp_path / "new"), "--json")
    assert (code, err) == (0, "")  # nothing to fetch again
    assert len(json.loads(out)["files"]) == 4
    assert '"verified"' in kfac("data", "list", "--data-dir", str(tmp_path / "new"), "--json")[1]
    assert fetch()[0] == 0
    assert "there, checksum right" in kfac("data", "list")[1]


def test_fetch_from_the_mirror_of_the_environment(kfac: Run, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC_MIRROR", mirror.as_uri())
    assert kfac("data", "fetch", "mnist16-classifier")[0] == 0


def test_fetch_shows_a_counting_line_on_terminals(kfac: Run, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, _, err = kfac("data", "fetch", "mnist", "--mirror", mirror.as_uri())
    assert code == 0
    assert err.count("100%\n") == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("fetch", "mnits"), 2, "did you mean 'mnist'"),
        (("fetch", "curves"), 2, "problems that have: mnist, faces, mnist16-classifier, shakespeare"),
        (("fetch", "mnist", "--mirror", "http://127.0.0.1:9"), 1, "is there a network"),
        (("fetch", "faces", "--mirror", "http://127.0.0.1:9"), 2, "leave out --mirror"),
        (("list", "--data-dir", "nowhere"), 2, "data folder nowhere does not exist"),
    ],
)
def test_mistakes_get_one_line_and_the_right_code(
    kfac: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = kfac("data", *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_wrong_content_is_an_error_of_the_data(kfac: Run, mirror: Path) -> None:
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    code, out, err = kfac("data", "fetch", "mnist", "--mirror", mirror.as_uri())
    assert (code, out) == (2, "")
    assert "wrong checksum" in err


PLUGIN = """
    from pathlib import Path
    from typing import Literal
    from kfacore.plugin import Component, ProblemConfig, hookimpl

    class MineConfig(ProblemConfig):
        kind: Literal["mine"] = "mine"
        {body}

    @hookimpl
    def kfac_components():
        return [Component("problem", "mine", MineConfig, "mine:Mine", "Mine.")]
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "says nothing about its data"),
        ("def data_status(self): return 1 / 0", "cannot say: ZeroDivisionError"),
    ],
)
def test_problems_of_others_do_not_hide_the_rest(
    kfac: Run, install_plugin: Callable[..., Path], body: str, message: str
) -> None:
    install_plugin("mine", PLUGIN.format(body=body))
    code, out, _ = kfac("data", "list")
    assert code == 0
    assert message in out
    assert "run 'kfac data fetch mnist'" in out
    found = {entry["problem"]: entry for entry in json.loads(kfac("data", "list", "--json")[1])}
    assert found["mine"]["state"] == "unknown"
    assert found["mnist"]["state"] == "missing"
