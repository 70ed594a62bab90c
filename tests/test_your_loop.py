"""The examples of docs/your_loop.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "your_loop.md").read_text(encoding="utf-8")
FIRST, *LATER = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
USES_WEIGHTS = "weights = nn.Parameter(torch.zeros(60))\n"


@pytest.mark.parametrize("number", range(len(LATER)))
def test_each_block_runs_after_the_first_one(number: int) -> None:
    exec(FIRST + USES_WEIGHTS + LATER[number], {})
