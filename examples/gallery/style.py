"""The look that all pictures of the gallery share, and the folder that they are written to."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

OURS, OTHER, THIRD, GREY = "#3f51b5", "#e07a1f", "#2e8b57", "#8a8a8a"
"""One colour for what `bilevel` computes, and others for what it is compared with."""

PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures" / "gallery"


def figure(columns: int = 2, height: float = 3.2) -> tuple[Any, Any]:
    """Return a figure and its axes, with text that is legible on a phone."""
    look: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    plt.rcParams.update({**look, "grid.alpha": 0.25, "lines.linewidth": 2, "legend.frameon": False})
    return plt.subplots(1, columns, figsize=(7.2, height), layout="constrained")


def finish(drawing: Any, script: str, results: Mapping[str, float]) -> None:
    """Print the results; write them and the picture under the script's name (into BILEVEL_PICTURES, if set)."""
    lines = [f"{name}: {value:.4g}" for name, value in results.items()]
    print("\n".join(lines))
    folder = Path(os.environ.get("BILEVEL_PICTURES", PICTURES))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{Path(script).stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save(drawing, folder / f"{Path(script).stem}.png")


def save(drawing: Any, path: Path) -> None:
    """Write the picture with 64 colours, which are enough for it, so that the file is small."""
    whole = io.BytesIO()
    drawing.savefig(whole, dpi=110, metadata={"Software": None})
    Image.open(whole).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
