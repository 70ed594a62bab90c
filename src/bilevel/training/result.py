"""The result of `fit`, and how it is saved and plotted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from bilevel import trees
from bilevel.models.conversion import as_plain_tree, as_tree
from bilevel.models.numpy_forms import as_tensors
from bilevel.report import page
from bilevel.report.files import write_bytes
from bilevel.training.metrics import Row


@dataclass(frozen=True)
class FitResult:
    """The result of `fit`.

    Attributes:
        meta: the trained meta parameters, in the form that `fit` was given; an `nn.Module` is trained in place.
        history: one dict for each outer step: `outer_step`, `phase`, `outer_loss`, `grad_norm`, `standard_error`,
            `signal_to_noise`, `seconds`; with `OuterUpdate(max_backtracks=…)` also `backtracks`, with
            `OuterUpdate(clip_norm=…)` also `clipped_to`; with a function as `keep` also `kept_by`; with `compile=True`
            also `compile_seconds`, which `seconds` does not include.
    """

    meta: Any
    history: list[Row]

    def __repr__(self) -> str:
        meta = trees.summary(as_tree(as_tensors(self.meta)))
        if not self.history:
            return f"FitResult(meta: {meta}, no outer steps)"
        losses = f"outer loss {self.history[0]['outer_loss']:.4g} to {self.history[-1]['outer_loss']:.4g}"
        return f"FitResult(meta: {meta}, {len(self.history)} outer steps, {losses})"

    def save(self, path: str | Path) -> None:
        """Write the meta parameters to a safetensors file, whole or not at all.

        `safetensors.torch.load_file(path)` gives a dict of tensors by their places in `meta`, joined by dots. For an
        `nn.Module` these are its parameters' names, so `load_state_dict(..., strict=False)` takes it. A lone tensor has
        the name `meta`.

        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     FitResult({"rates": [torch.ones(2)]}, []).save(f"{folder}/meta.safetensors")
        ...     safetensors.torch.load_file(f"{folder}/meta.safetensors")
        {'rates.0': tensor([1., 1.])}
        """
        tree = as_plain_tree(as_tree(as_tensors(self.meta)))
        found = {
            ".".join(map(str, place)) or "meta": leaf.detach().cpu().contiguous().clone()
            for place, leaf in trees.leaves_with_paths(tree)
            if isinstance(leaf, Tensor)
        }
        write_bytes(Path(path), safetensors.torch.save(found))

    def plot(self, path: str | Path | None = None) -> Any:
        """Plot the outer loss and the norm of the hypergradient over the outer steps; needs matplotlib.

        Args:
            path: a file for the picture, such as `run.png`; `None` to write none.

        Returns:
            The matplotlib figure.
        """
        if not self.history:
            raise ValueError("there is nothing to plot: the history has no outer steps")
        figure = page.figure_of(self.history)
        if path is not None:
            write_bytes(Path(path), page.as_png(figure, close=False, format=Path(path).suffix.lstrip(".") or "png"))
        return figure
