"""The page of a run: one self-contained HTML file with headline numbers, pictures, curves and all settings."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.report.files import write_text


@dataclass(frozen=True)
class Section:
    """A part of a page, with a title, a text, and a picture or a table or both."""

    title: str
    words: str = ""
    picture: str = ""
    """The picture as a `data:` address, made by `as_picture`."""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def write(
    path: Path, title: str, subtitle: str, headline: Sequence[tuple[str, str]], sections: Iterable[Section]
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file.
        title: the heading of the page.
        subtitle: the line below the heading.
        headline: the main results, as pairs of a name and a value.
        sections: the parts of the page, in order.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bilevel", "report/templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja")
    write_text(path, page.render(title=title, subtitle=subtitle, headline=headline, sections=list(sections)))


def as_picture(figure: Any, dpi: int = 110) -> str:
    """Convert a matplotlib figure into a `data:` address and close it."""
    return "data:image/png;base64," + base64.b64encode(as_png(figure, dpi)).decode()


def as_png(figure: Any, dpi: int = 110, close: bool = True, format: str = "png") -> bytes:
    """Convert a matplotlib figure into the bytes of a picture file and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=dpi, bbox_inches="tight")
    if close:
        plt.close(figure)
    return buffer.getvalue()


def figure(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Call `matplotlib.pyplot.subplots` with a backend that draws off screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def curves(rows: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> Section:
    """Plot the outer loss, and the norm of the hypergradient with its standard error, over the outer steps.

    Args:
        rows: the metrics of the outer steps, as `metrics.jsonl` holds them.
        phases: the estimator of each phase, in words.
    """
    fig = figure_of(rows)
    first_of_phase = _first_of_phase(rows)
    words = "Estimator: " + ", then ".join(phases) + "."
    if first_of_phase:
        words += " A dotted line marks the start of the next phase."
    if all(row["standard_error"] is None for row in rows):
        words += (
            " These methods draw no random directions, so they have no standard error. The table of methods in the "
        )
        words += "documentation tells which of them are exact."
    return Section("Outer loop", words, as_picture(fig))


def figure_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Plot the outer loss, and the norm of the hypergradient with its standard error, as a matplotlib figure."""
    fig, (left, right) = figure(1, 2, figsize=(11, 3.6))
    steps = [row["outer_step"] for row in rows]
    losses = [_number(row["outer_loss"]) for row in rows]
    dots = "." if len(rows) < 30 else ""
    width = max(1, len(losses) // 30)
    if width > 1:
        left.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
        left.plot(steps, running_mean(losses, width), color="C0", label=f"mean of the last {width}")
        left.legend(frameon=False)
    else:
        left.plot(steps, losses, color="C0", marker=dots)
    left.set(ylabel="outer loss")
    norms = [_number(row["grad_norm"]) for row in rows]
    right.plot(steps, norms, color="C1", marker=dots, label="‖hypergradient estimate‖")
    if any(row["standard_error"] is not None for row in rows):
        errors = [_number(row["standard_error"]) for row in rows]
        right.plot(steps, errors, color="C3", marker=dots, linewidth=0.9, label="its standard error")
    if any(norm > 0 for norm in norms):
        right.set(yscale="log")
    right.legend(frameon=False)
    first_of_phase = _first_of_phase(rows)
    for axis in (left, right):
        for i in first_of_phase:
            axis.axvline(steps[i] - 0.5, color="0.4", linestyle=":", linewidth=1)
        axis.set(xlabel="outer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    return fig


def _first_of_phase(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [i for i in range(1, len(rows)) if rows[i]["phase"] != rows[i - 1]["phase"]]


def settings(config: Mapping[str, Any]) -> Section:
    """List every setting of the run."""
    rows = [
        (name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for name, value in _flat(config)
    ]
    return Section("Settings", header=("setting", "value"), rows=rows)


def _flat(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and the `width - 1` values before it."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
