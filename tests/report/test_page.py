"""The report page: one file without anything from elsewhere, whose pictures show the numbers they were given."""

from __future__ import annotations

import base64
import math
import os
from pathlib import Path
from typing import Any

import pytest
from pages import Page

from bilevel.report import page
from bilevel.report.page import Section


def written(folder: Path, *sections: Section, title: str = "title", subtitle: str = "subtitle") -> str:
    path = folder / "report.html"
    page.write(path, title, subtitle, [("accuracy", "98 %")], sections)
    return path.read_text(encoding="utf-8")


def row(step: int, loss: float | None = 1.0, norm: float = 1.0, error: float | None = None, phase: int = 0) -> Any:
    return {"outer_step": step, "phase": phase, "outer_loss": loss, "grad_norm": norm, "standard_error": error}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that go into the page, still open."""
    import matplotlib.pyplot as plt

    seen: list[Any] = []

    def keep(figure: Any) -> str:
        figure.canvas.draw()
        seen.append(figure)
        plt.close(figure)
        return "data:,"

    monkeypatch.setattr(page, "as_picture", keep)
    return seen


def test_a_page(tmp_path: Path) -> None:
    section = Section("A section", "Some words.", "data:,", ("setting", "value"), [("lr", "0.1"), ("ipc", "1")])
    page = Page(written(tmp_path, section))
    assert page.texts["title"] == page.texts["h1"] == ["title"]
    assert page.texts["h2"] == ["A section"]
    assert page.texts["p"] == ["subtitle", "Some words."]
    assert (page.texts["b"], page.texts["span"]) == (["98 %"], ["accuracy"])
    assert (page.texts["th"], page.texts["td"]) == (["setting", "value"], ["lr", "0.1", "ipc", "1"])
    assert page.addresses == ["data:,"]
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_parts_that_a_section_lacks_are_left_out(tmp_path: Path) -> None:
    page = Page(written(tmp_path, Section("Bare")))
    assert not {"img", "table"} & set(page.tags)
    assert page.texts["p"] == ["subtitle"]


def test_text_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>"
    page = written(tmp_path, Section(evil, evil, "data:,", (evil,), [(evil,)]), title=evil, subtitle=evil)
    assert "script" not in Page(page).tags
    assert page.count("&lt;script&gt;") == 8  # the title twice, the section's also as the picture's description


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        written(tmp_path, Section("x"))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_in_the_page_and_its_figure_closed() -> None:
    import matplotlib.pyplot as plt

    open_before = plt.get_fignums()
    figure, axis = page.figure(figsize=(1, 1))
    axis.plot([0, 1], [0, 1])
    address = page.as_picture(figure)
    kind, content = address.split(",", 1)
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content, validate=True).startswith(b"\x89PNG\r\n")
    assert plt.get_fignums() == open_before


def test_a_section_of_settings() -> None:
    section = page.settings({"task": "t", "phases": ["reverse:1", "forward:2"], "nested": {"lr": 0.1, "none": None}})
    assert section.rows == [("task", "t"), ("phases", "reverse:1, forward:2"), ("lr", "0.1"), ("none", "None")]


def test_curves_of_a_short_run_are_its_numbers(figures: list[Any]) -> None:
    losses, norms, errors = [3.0, 1.0, 2.0], [0.1, 10.0, 1.0], [0.5, None, 0.25]
    rows = [row(i, loss, norm, error) for i, (loss, norm, error) in enumerate(zip(losses, norms, errors, strict=True))]
    section = page.curves(rows, ["forward-gradient:3"])
    assert section.words == "Estimator: forward-gradient:3."
    left, right = figures[0].axes
    (loss_line,) = left.lines
    assert [list(xy) for xy in loss_line.get_data()] == [[0, 1, 2], losses]
    assert loss_line.get_marker() == "."  # a run of one step is a line without length
    norm_line, error_line = right.lines
    assert list(norm_line.get_ydata()) == norms
    assert list(error_line.get_ydata()) == pytest.approx([0.5, math.nan, 0.25], nan_ok=True)
    assert right.get_yscale() == "log"
    for axis in (left, right):
        assert all(tick == round(tick) for tick in axis.get_xticks())


def test_curves_of_a_long_run_have_a_running_mean(figures: list[Any]) -> None:
    losses = [float((7 * i) % 11) for i in range(95)]  # 95 // 30 = 3
    page.curves([row(i, loss) for i, loss in enumerate(losses)], ["reverse:95"])
    each, mean = figures[0].axes[0].lines
    assert list(each.get_ydata()) == losses
    assert mean.get_label() == "mean of the last 3"
    expected = [losses[0], sum(losses[:2]) / 2, *(sum(losses[i - 2 : i + 1]) / 3 for i in range(2, 95))]
    assert list(mean.get_ydata()) == pytest.approx(expected)


def test_curves_mark_where_a_phase_begins(figures: list[Any]) -> None:
    rows = [row(i, phase=phase, error=1.0) for i, phase in enumerate([0, 0, 1, 1, 1, 2])]
    section = page.curves(rows, ["a:2", "b:3", "c:1"])
    assert section.words == "Estimator: a:2, then b:3, then c:1. A dotted line marks the start of the next phase."
    for axis in figures[0].axes:
        dotted = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"]
        assert dotted == [1.5, 4.5]


def test_curves_say_why_there_is_no_standard_error(figures: list[Any]) -> None:
    section = page.curves([row(0)], ["reverse:1"])
    assert "no random directions" in section.words
    assert [line.get_label() for line in figures[0].axes[1].lines] == ["‖hypergradient estimate‖"]


def test_curves_of_nothing_but_zeros_and_gaps() -> None:
    page.curves([row(0, None, 0.0), row(1, 1.0, 0.0)], ["reverse:2"])  # a warning, such as matplotlib's, would fail
