"""The faces problem: finding the images, cutting patches, normalising them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from kfac_plugins.likelihoods.gaussian import Gaussian
from kfac_plugins.problems import FacesConfig
from kfac_plugins.problems.faces import Faces, cut_patches
from kfac_plugins.problems.olivetti import fetch_olivetti, find_olivetti, olivetti_status, read_olivetti
from kfacore.errors import ConfigError, DataError, ResourceError
from kfacore.lab.data import check

REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data of this machine are seen."""
    monkeypatch.setenv("KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))


def made_up(images_each: int = 2) -> dict[str, np.ndarray]:
    """Two smooth "faces" of each of 40 people."""
    rng = np.random.default_rng(0)
    coarse = rng.random((40 * images_each, 5, 5))
    weights = np.array([np.clip(1 - np.abs(np.linspace(0, 4, 64) - node), 0, 1) for node in range(5)])
    images = np.einsum("ih,nij,jw->nhw", weights, coarse, weights)
    return {"images": (images * 240).astype(np.uint8), "person": np.arange(40).repeat(images_each)}


@pytest.fixture(params=["made up", *(["real"] if (REAL / "olivetti.npz").is_file() else [])])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "real":
        return REAL
    np.savez(tmp_path / "olivetti.npz", **made_up())
    return tmp_path


def faces(folder: Path, patches: int = 6) -> Faces:
    return Faces(FacesConfig(data_dir=str(folder), patches_per_image=patches))


def test_normalised_patches(folder: Path) -> None:
    data = faces(folder).load()
    with np.load(folder / "olivetti.npz") as archive:
        person = archive["person"]
    assert data.train.targets is data.train.inputs
    assert data.test is not None
    assert data.train.inputs.shape == (6 * (person < 25).sum(), 625)
    assert data.test.inputs.shape == (6 * (person >= 30).sum(), 625)
    check(data, Gaussian(), 625)
    values = data.train.inputs.double()
    assert values.mean(0).abs().max() < 1e-5
    assert float(values.var(0, correction=0).mean()) == pytest.approx(1.0, abs=1e-5)
    # the test set uses the numbers of the training set, so its own are near but not exact
    assert float(data.test.inputs.mean(0).abs().max()) > 1e-3
    assert data.facts["patches_per_image"] == 6


def test_paper_size() -> None:
    assert FacesConfig().patches_per_image * 10 * 25 == 103_500


def test_picture_undoes_the_normalisation(folder: Path) -> None:
    problem = faces(folder)
    data = problem.load()
    pictures = problem.picture(data.train.inputs)
    with np.load(folder / "olivetti.npz") as archive:
        patches = cut_patches(archive["images"].astype(np.float32), 6)
    count = len(pictures)
    np.testing.assert_allclose(pictures.numpy() * 255.0, patches[:count], atol=1e-3)
    # without load() as well, in any dtype
    fresh = faces(folder).picture(data.train.inputs[:5].double())
    torch.testing.assert_close(fresh, pictures[:5].double(), rtol=0, atol=1e-5)


def test_cache_is_used_and_follows_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "olivetti.npz", **made_up())
    first = faces(tmp_path).load()
    assert len(list((tmp_path / "data").glob("faces-v1-6-*.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr("kfac_plugins.problems.faces.cut_patches", None)  # would fail if called
        second = faces(tmp_path).load()
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert first.checksum == second.checksum
    arrays = made_up()
    np.savez(tmp_path / "olivetti.npz", images=255 - arrays["images"], person=arrays["person"])
    third = faces(tmp_path).load()
    assert third.checksum != first.checksum
    assert faces(tmp_path, 3).load().train.inputs.shape[0] == first.train.inputs.shape[0] // 2


def test_patches_follow_the_recipe() -> None:
    """On an image whose value is linear in the position, a patch shows its own grid: spacing, angle and place."""
    row, column = np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij")
    count = 300
    down, across = (cut_patches(image[None].astype(np.float32) * 4.0, count) / 4.0 for image in (row, column))
    rows, columns = (axis.reshape(count, 25, 25) for axis in (down, across))
    # the vectors of one step down and one step across, from corner to corner to beat the rounding
    step_down = np.stack([rows[:, -1, 0] - rows[:, 0, 0], columns[:, -1, 0] - columns[:, 0, 0]], axis=1) / 24.0
    step_across = np.stack([rows[:, 0, -1] - rows[:, 0, 0], columns[:, 0, -1] - columns[:, 0, 0]], axis=1) / 24.0
    scale = np.hypot(*step_down.T)
    assert scale.min() > 1.4 - 0.02
    assert scale.max() < 1.8 + 0.02
    assert scale.max() - scale.min() > 0.38
    np.testing.assert_allclose(np.hypot(*step_across.T), scale, atol=0.03)
    np.testing.assert_allclose((step_down * step_across).sum(1), 0.0, atol=0.05)  # square, not skewed
    np.testing.assert_allclose(np.linalg.det(np.stack([step_down, step_across], 1)), scale**2, atol=0.08)  # no mirror
    angle = np.degrees(np.arctan2(step_across[:, 0], step_across[:, 1]))
    assert angle.min() < -85.0
    assert angle.max() > 85.0
    assert abs(angle.mean()) < 5 * 52 / count**0.5
    centre = rows[:, 12, 12]
    assert centre.max() - centre.min() > 20.0
    assert rows.min() >= 0.0
    assert columns.max() <= 63.0


def test_patches_are_bilinear_and_deterministic() -> None:
    image = made_up()["images"][:3].astype(np.float32)
    patches = cut_patches(image, 4)
    np.testing.assert_array_equal(patches, cut_patches(image, 4))
    assert not np.array_equal(patches, cut_patches(image, 4, seed=1))
    # between pixels: the product of row and column is what bilinear interpolation reproduces exactly
    row, column = np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij")
    saddle = row * column / 63.0**2 * 250.0
    rows, columns, values = (cut_patches(i[None].astype(np.float32), 50) for i in (row * 4, column * 4, saddle))
    expected = (rows / 4.0) * (columns / 4.0) / 63.0**2 * 250.0
    np.testing.assert_allclose(values, expected, atol=1.6)  # the positions are known to 1/8 pixel
    flat = cut_patches(np.full((1, 64, 64), 77.0, np.float32), 5)
    assert (flat == 77).all()


def test_missing_faces_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"olivetti\.npz\) are not in .*kfac data fetch faces.*--data-dir"):
        Faces().load()
    assert olivetti_status().state == "missing"
    with pytest.raises(DataError, match="does not exist"):
        read_olivetti(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((80, 64, 63), np.uint8)}, r"shape \(80, 64, 63\)"),
        ({"images": np.full((80, 64, 64), 2.0)}, "from 0 to 1 "),
        ({"images": np.full((80, 64, 64), np.nan)}, "finite"),
        ({"images": np.full((80, 64, 64), "a")}, "dtype <U1"),
        ({"person": np.arange(79)}, r"'person' has shape \(79,\)"),
        ({"person": np.arange(80)}, "from 0 to 79"),
        ({"person": np.zeros(80, int)}, "no images of the people for the testing set"),
        ({"images": np.full((80, 64, 64), 9, np.uint8)}, "all patches are equal"),
    ],
)
def test_wrong_arrays(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "olivetti.npz", **{**made_up(), **change})
    with pytest.raises(DataError, match=rf"olivetti\.npz: .*{message}"):
        faces(tmp_path).load()


def test_status(tmp_path: Path) -> None:
    np.savez(tmp_path / "olivetti.npz", **made_up())
    there = olivetti_status(tmp_path)
    assert (there.state, there.where) == ("unverified", (tmp_path / "olivetti.npz",))
    (tmp_path / "olivetti.npz").write_bytes(b"spoiled")
    spoiled = olivetti_status(tmp_path)
    assert spoiled.state == "corrupt"
    assert "not a .npz file" in spoiled.advice


@pytest.fixture
def sklearn(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for scikit-learn: ``outcome`` is what its fetcher returns or raises."""
    arrays = made_up()
    bunch = SimpleNamespace(images=(arrays["images"] / 240.0).astype(np.float32), target=arrays["person"])
    fake = SimpleNamespace(outcome=bunch, downloads=[])

    def fetch_olivetti_faces(*, download_if_missing: bool) -> object:
        print("downloading from somewhere")  # as scikit-learn does, on stdout
        fake.downloads.append(download_if_missing)
        if isinstance(fake.outcome, Exception):
            raise fake.outcome
        return fake.outcome

    module = ModuleType("sklearn.datasets")
    module.fetch_olivetti_faces = fetch_olivetti_faces  # type: ignore[attr-defined]  # a module made up for the test
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    return fake


def test_fetch_through_sklearn(tmp_path: Path, sklearn: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = fetch_olivetti(tmp_path / "new", (), lambda *_: None)
    assert sklearn.downloads == [True]
    assert capsys.readouterr().out == ""
    found = read_olivetti(tmp_path / "new")
    assert found.source == path
    np.testing.assert_allclose(found.images, made_up()["images"] * (255.0 / 240.0), rtol=1e-5)
    assert len(faces(tmp_path / "new", 2).load().train) == 100


def test_copy_of_sklearn_is_used(tmp_path: Path, sklearn: SimpleNamespace) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "olivetti_py3.pkz").touch()
    assert find_olivetti() == tmp_path / "sklearn" / "olivetti_py3.pkz"
    assert len(read_olivetti().images) == 80
    assert sklearn.downloads == [False]
    assert olivetti_status().state == "unverified"


def test_fetch_failures(tmp_path: Path, sklearn: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="leave out --mirror"):
        fetch_olivetti(tmp_path, ("http://mirror",), lambda *_: None)
    (tmp_path / "blocked").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        fetch_olivetti(tmp_path / "blocked" / "data", (), lambda *_: None)
    sklearn.outcome = OSError("Name or service not known")
    with pytest.raises(ResourceError, match=r"Name or service not known.*check the network"):
        fetch_olivetti(tmp_path, (), lambda *_: None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ResourceError, match=r"needs scikit-learn.*kfacore\[faces\]"):
        fetch_olivetti(tmp_path, (), lambda *_: None)
    assert not (tmp_path / "olivetti.npz").exists()
