"""Draw docs/pictures/peers.png from benchmarks/results/peers.json.

    python docs/make_pictures.py

Peak memory and process time of one exact hypergradient through 200 inner steps, by this library and by others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "gallery"))

import style  # noqa: E402

METHODS = {
    "higher": "higher",
    "TorchOpt": "TorchOpt",
    "Bergson": "Bergson",
    'Reverse("graph")': "bilevel, graph",
    'Reverse("all")': "bilevel, states",
    'Reverse("sqrt")': "bilevel, √T states",
}
MODELS = {"mlp-adam": "MLP, Adam", "convnet-momentum": "convnet, momentum"}


def main() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))["rows"]
    drawing, axes = style.figure(2, height=3.6)
    for axis, key in zip(axes, ("memory", "time"), strict=True):
        for shift, (model, label) in zip((-0.2, 0.2), MODELS.items(), strict=True):
            found = {row["method"]: row for row in rows if row["model"] == model and row["steps"] == 200}
            plain = found["plain descent"]["seconds"]
            values = [
                found[method]["extra_bytes"] / 2**20 if key == "memory" else found[method]["seconds"] / plain
                for method in METHODS
            ]
            color = style.OURS if shift < 0 else style.OTHER
            bars = axis.barh([i + shift for i in range(len(METHODS))], values, 0.36, color=color, label=label)
            axis.bar_label(bars, [f"{value:.0f}" if key == "memory" else f"{value:.1f}" for value in values], padding=2)
        axis.set(yticks=range(len(METHODS)), yticklabels=METHODS.values() if key == "memory" else [])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    axes[0].set(xlabel="extra memory, MiB", xscale="log", xlim=(5, 6000))
    axes[1].set(xlabel="time, in plain inner loops", xlim=(0, 8.5))
    axes[1].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=9)
    style.save(drawing, ROOT / "docs" / "pictures" / "peers.png")


if __name__ == "__main__":
    main()
