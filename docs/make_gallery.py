"""Write docs/gallery.md from the scripts in examples/gallery/, their pictures and their results.

    python docs/make_gallery.py          # write the page
    python docs/make_gallery.py NAME ... # run these scripts first, or all of them with "all"

A script writes its picture and its results into docs/pictures/gallery/.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
SCRIPTS = DOCS.parent / "examples" / "gallery"
PICTURES = DOCS / "pictures" / "gallery"
PAGE = DOCS / "gallery.md"
ORDER = [
    "noisy_labels",
    "maml",
    "mixture",
    "condensation",
    "learning_rates",
    "ridge",
    "ode",
    "own_solver",
]
HEAD = """# Gallery

Whole jobs, each a script of at most sixty lines of code that takes less than a minute of one core. Every script
compares its result with what one would do without this library, and says so where that is the better tool. The scripts
lie in `examples/gallery/`; they need `pip install 'bilevel[tasks]'`. Their results were measured with PyTorch 2.13 on
x86-64; other machines round differently.
"""


def section(name: str) -> str:
    """Return the part of the page that shows a script."""
    code = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(code)) or ""
    title, text = docstring.split("\n\n", 1)
    results = (PICTURES / f"{name}.txt").read_text(encoding="utf-8")
    shown = code.split('"""\n', 1)[1].strip().split('"""', 1)[-1].strip()
    alternative = f"{title} {'; '.join(results.splitlines())}."
    return f"""
## {title.rstrip(".")}

{text.strip()}

![{alternative}](pictures/gallery/{name}.png)

```text
{results.strip()}
```

??? example "examples/gallery/{name}.py"

    ```py
{chr(10).join(f"    {line}".rstrip() for line in shown.splitlines())}
    ```
"""


def page() -> str:
    """Return the page as the scripts, pictures and results make it."""
    return HEAD + "".join(section(name) for name in ORDER)


if __name__ == "__main__":
    names = ORDER if sys.argv[1:] == ["all"] else sys.argv[1:]
    for name in names:
        subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py")], check=True)
    PAGE.write_text(page(), encoding="utf-8")
