"""What all pictures share: files written whole, scales, views that a few far values do not flatten."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kfacore.errors import ResourceError
from kfacore.lab.training.figures import clip_view, mark_edge, new_figure, number, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(*lines: list[float]) -> Axes:
    ax: Axes = new_figure(4.0, 3.0).subplots()
    for line in lines:
        ax.plot(range(len(line)), line)
    return ax


@pytest.mark.parametrize(
    ("value", "found"),
    [(3, 3.0), (0.5, 0.5), (None, None), (True, None), ("3", None), (float("nan"), None), (float("-inf"), None)],
)
def test_numbers_of_events(value: object, found: float | None) -> None:
    assert number(value) == found


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    figure = new_figure(2.0, 1.0)
    assert save_figure(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ResourceError, match="missing"):
        save_figure(figure, tmp_path / "missing" / "a.png")


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 4.0], "log"),
        ([1.0, 2.9], "linear"),
        ([0.0, 1.0, 4.0], "log"),
        ([0.0, 4.0], "linear"),
        ([0.0, 0.0], "linear"),
        ([-1.0, 1.0, 9.0], "linear"),
        ([-1.0, *[1.0, 9.0] * 10], "log"),
    ],
)
def test_the_scale_follows_the_positive_values(values: list[float], scale: str) -> None:
    ax = axes(values)
    tidy(ax, log=True)
    assert ax.get_yscale() == scale
    linear = axes(values)
    tidy(linear, log=False)
    assert linear.get_yscale() == "linear"


def test_the_scale_follows_all_axes_of_a_quantity() -> None:
    flat, steep = axes([1.0, 2.0]), axes([1.0, 9.0])
    tidy(flat, log=True, like=[steep])
    assert flat.get_yscale() == "log"


def test_zeros_leave_a_logarithmic_view_through_the_bottom() -> None:
    ax = axes([8.0, 0.5, 0.0, 1.0, 0.0])
    tidy(ax, log=True)
    assert ax.get_ylim()[0] == pytest.approx(0.25)
    marks = ax.get_lines()[-1]
    assert (list(marks.get_xdata()), list(marks.get_ydata())) == ([2.0, 4.0], [0.0, 0.0])


def test_so_do_a_few_negative_values() -> None:
    ax = axes([*([1.0, 9.0] * 10), -2.0])
    tidy(ax, log=True)
    assert list(ax.get_lines()[-1].get_xdata()) == [20.0]
    assert clip_view(ax, log=True) == ([], [])


def test_few_labels_of_a_short_logarithmic_axis_are_numbers() -> None:
    ax = axes([20.0, 90.0])
    tidy(ax, log=True)
    ax.figure.draw_without_rendering()
    assert "50" in [label.get_text() for label in ax.get_yticklabels()]


def test_far_values_are_put_out_of_view() -> None:
    ax = axes([*([1.0, 2.0] * 50), 90.0, -30.0])
    assert clip_view(ax, log=False) == ([(100.0, 90.0)], [(101.0, -30.0)])
    bottom, top = ax.get_ylim()
    assert 0.5 < bottom < 1.0
    assert 2.0 < top < 2.5


def test_far_values_of_a_logarithmic_axis_are_far_in_logarithms() -> None:
    ax = axes([*([1.0, 2.0] * 50), 1e6, 5.0])
    assert clip_view(ax, log=True) == ([(100.0, 1e6), (101.0, 5.0)], [])
    assert axes_are_left_alone([*([1.0, 100.0] * 50), 1e4], log=True)


@pytest.mark.parametrize(
    "values", [[*([1.0, 2.0] * 9), 99.0], [1.0] * 100, [0.1 * k for k in range(100)], [*([1.0, 2.0] * 50), 3.5]]
)
def test_a_view_without_far_values_is_left_alone(values: list[float]) -> None:
    """Also one with too few values to call any of them far."""
    assert axes_are_left_alone(values, log=False)


def axes_are_left_alone(values: list[float], *, log: bool) -> bool:
    ax = axes(values)
    before = ax.get_ylim()
    return clip_view(ax, log=log) == ([], []) and ax.get_ylim() == before


def test_marks_stay_on_the_edge_and_count_as_no_data() -> None:
    ax = axes([1.0, 2.0] * 20)
    mark_edge(ax, [3.0], top=True, color="black", label="far")
    mark_edge(ax, [], top=True, color="black")
    assert len(ax.get_lines()) == 2
    assert ax.get_lines()[1].get_transform() == ax.get_xaxis_transform()
    assert clip_view(ax, log=False) == ([], [])
    tidy(ax, log=True)  # were the mark's 1.0 data, or its 0.0, the scale could change
    assert ax.get_yscale() == "linear"
