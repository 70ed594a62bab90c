"""Stands for anybody's simulator: reads `input.json`, writes `output.csv`. It knows nothing of bilevel.

    u_t = d u_xx on (0, 1), u = 0 at both ends, u(0, x) = x (1 − x)

by implicit steps on a grid. Now and then it crashes or hangs, as simulators do, if its input asks for that.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from scipy.linalg import solve_banded


def main() -> None:
    given = json.loads(Path("input.json").read_text())
    diffusion, cells, steps = given["diffusion"], given["cells"], given["steps"]
    if given.get("misbehave") == "crash":
        sys.exit("segmentation fault, or so")
    if given.get("misbehave") == "hang":
        time.sleep(3600)
    if diffusion <= 0:
        sys.exit(f"diffusion = {diffusion} is not positive")
    x = np.linspace(0, 1, cells + 1)
    u = (x * (1 - x))[1:-1]
    ratio = diffusion / steps * cells**2
    matrix = np.zeros((3, cells - 1))
    matrix[0, 1:], matrix[1], matrix[2, :-1] = -ratio, 1 + 2 * ratio, -ratio
    for _ in range(steps):
        u = solve_banded((1, 1), matrix, u)
    np.savetxt("output.csv", u)


if __name__ == "__main__":
    main()
