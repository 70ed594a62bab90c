"""Pictures and the page of a result."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bilevel import checks
from bilevel.report import page


class Scored(Protocol):
    """What is drawn of an `Attribution`."""

    @property
    def scores(self) -> Tensor: ...
    @property
    def losses(self) -> Tensor: ...
    @property
    def training(self) -> Any: ...
    @property
    def queries(self) -> Any: ...
    @property
    def method(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    def most_helpful(self, count: int) -> Tensor: ...
    def most_harmful(self, count: int) -> Tensor: ...


def npy_bytes(scores: Tensor) -> bytes:
    """Return the content of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, scores.numpy(force=True))
    return buffer.getvalue()


def figure_of(found: Scored, queries: int, count: int) -> Any:
    """Draw queries and the images of their most helpful and most harmful examples."""
    queries = min(checks.whole_number(queries, "queries"), len(found.losses))
    count = min(checks.whole_number(count, "count"), found.scores.shape[1] // 2 or 1)
    asked, examples = images(found.queries), images(found.training.dataset)
    if asked is None or examples is None:
        raise TypeError(
            "the queries and the examples are no images [n, ..., height, width] or [n, pixels] of a square; "
            "most_helpful() and most_harmful() return their numbers"
        )
    names, labels = labels_of(found.queries), labels_of(found.training.dataset)
    helpful, harmful = found.most_helpful(count), found.most_harmful(count)
    fig, axes = page.figure(
        queries, 2 * count + 1, figsize=(1.0 * (2 * count + 1) + 0.4, 1.25 * queries + 0.5), squeeze=False
    )
    for row, line in enumerate(axes):
        pictures = [(asked[row], f"query {row}" + named(names, row), "black")]
        pictures += [
            (examples[i], f"{found.scores[row, i]:+.2g}" + named(labels, i), "C0") for i in helpful[row].tolist()
        ]
        pictures += [
            (examples[i], f"{found.scores[row, i]:+.2g}" + named(labels, i), "C3") for i in harmful[row].tolist()
        ]
        for axis, (image, title, color) in zip(line, pictures, strict=True):
            axis.imshow(image, cmap="gray_r" if image.ndim == 2 else None)
            axis.set_title(title, fontsize=7, color=color)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(edgecolor=color, linewidth=1.5 if color != "black" else 0.8)
    words = "left: the query · blue: most helpful examples · red: most harmful examples (score, label)"
    fig.suptitle(words, fontsize=8, y=0.99)
    fig.subplots_adjust(wspace=0.25, hspace=0.45, top=1 - 0.4 / fig.get_figheight(), bottom=0.02)
    return fig


def write_page(found: Scored, path: Path, queries: int, count: int) -> None:
    """Write the page of a result, whole or not at all."""
    queries = min(checks.whole_number(queries, "queries"), len(found.losses))
    count = min(checks.whole_number(count, "count"), found.scores.shape[1])
    drawable = images(found.queries) is not None and images(found.training.dataset) is not None
    picture = page.as_picture(figure_of(found, queries, count)) if drawable else ""
    helpful, harmful = found.most_helpful(count).tolist(), found.most_harmful(count).tolist()
    rows = [
        (
            str(q),
            f"{found.losses[q]:.4g}",
            *(", ".join(f"{i} ({found.scores[q, i]:+.2g})" for i in kind[q]) for kind in (helpful, harmful)),
        )
        for q in range(queries)
    ]
    words = (
        "A positive score says that the example lowered the loss of the query: the derivative of the loss with respect "
        "to the example's weight, with its sign reversed."
    )
    header = ("query", "loss", "most helpful examples (score)", "most harmful examples (score)")
    headline = [
        ("queries", str(found.scores.shape[0])),
        ("training examples", str(found.scores.shape[1])),
        ("seconds", f"{found.seconds:.1f}"),
    ]
    page.write(
        path,
        "Which examples made the model so",
        found.method,
        headline,
        [page.Section("Queries and examples", words, picture, header, rows)],
    )


def images(data: Any) -> np.ndarray | None:
    """Return the first tensor of a batch as images `[n, height, width]` or `[n, height, width, 3]`; else `None`."""
    column = next((value for value in _parts(data) if isinstance(value, Tensor | np.ndarray) and value.ndim > 1), None)
    if column is None:
        return None
    tensor = torch.as_tensor(column).detach().float().cpu()
    if tensor.ndim == 2:
        side = math.isqrt(tensor.shape[1])
        return tensor.reshape(-1, side, side).numpy() if side > 3 and side * side == tensor.shape[1] else None
    if tensor.ndim == 3:
        return tensor.numpy()
    if tensor.ndim == 4 and tensor.shape[1] in (1, 3):
        low, high = tensor.min(), tensor.max()
        scaled = (tensor - low) / (high - low).clamp_min(1e-12)
        return scaled[:, 0].numpy() if tensor.shape[1] == 1 else scaled.movedim(1, -1).numpy()
    return None


def labels_of(data: Any) -> Tensor | None:
    """Return the first vector of whole numbers in a batch."""
    for value in _parts(data):
        if (
            isinstance(value, Tensor | np.ndarray)
            and value.ndim == 1
            and not torch.as_tensor(value).is_floating_point()
        ):
            return torch.as_tensor(value)
    return None


def named(labels: Tensor | None, number: int) -> str:
    """Return an example's label in parentheses, if there are labels."""
    return "" if labels is None else f" ({labels[number].item()})"


def _parts(data: Any) -> list[Any]:
    if isinstance(data, Mapping):
        return list(data.values())
    return list(data) if isinstance(data, list | tuple) else [data]
