"""Time and memory of the two ways back through one inner step, on an MLP, a convnet and a GPT-2.

    python benchmarks/products.py                    # every model; about two minutes
    python benchmarks/products.py --models mlp-adam  # measured anew, the others kept

One thread. Time: process time of one step's product over that of one plain step, medians of 9 by turns. Memory: peak of
the bytes in live tensors above what lay there before. Writes `benchmarks/results/products.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import MODELS, gpt2_recomputed
from torch import Tensor

import bilevel
from bilevel import autodiff, trees
from bilevel.models.module_view import modules_in
from bilevel.planning.live_memory import counting
from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar
from bilevel.unrolling.step_products import Product, faster_product, pull_back_step
from bilevel.unrolling.unroll import unroll

RESULTS = Path(__file__).parent / "results"
SUBJECTS = {**MODELS, "gpt2-sgd, layers recomputed": gpt2_recomputed}
PRODUCTS: tuple[Product, ...] = ("reverse", "mixed")
REPEATS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    wanted = parser.parse_args().models
    torch.set_num_threads(1)
    path = RESULTS / "products.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["model"] not in wanted]
    with bar("models", len(wanted)) as shown:
        for name in wanted:
            rows.append(measured(name))
            shown.advance(name)
    rows.sort(key=lambda row: list(SUBJECTS).index(row["model"]))
    versions = {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()}
    write_json(path, {"command": "python benchmarks/products.py", "versions": versions, "rows": rows})
    write_text(RESULTS / "products.md", as_markdown(rows, versions))
    print((RESULTS / "products.md").read_text())


def measured(name: str) -> dict[str, Any]:
    """Both products on the third step of that model's inner loop."""
    subject = SUBJECTS[name]()
    problem, meta = subject.problem(), subject.meta
    run = unroll(problem, meta, bilevel.no_batches(3), None, seed=0)
    state = run.descend(run.start(), 0, 2)
    torch.manual_seed(0)
    d: list[Tensor] = [torch.randn_like(t) for t in trees.split(state).differentiable]
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: run.descend(state, 2, 3),
        **{p: lambda p=p: pull_back_step(run, 2, state, list(d), p) for p in PRODUCTS},
    }
    with autodiff.differentiable_kernels(modules_in([state])):
        seconds: dict[str, list[float]] = {key: [] for key in calls}
        results = {key: call() for key, call in calls.items()}
        for _ in range(REPEATS):
            for key, call in calls.items():
                start = time.process_time()
                call()
                seconds[key].append(time.process_time() - start)
        peaks = {}
        for key, call in calls.items():
            with counting() as live:
                call()
            peaks[key] = live.peak
        chosen = faster_product(run, d)
    reference, other = ([t for t in results[p][1] if t is not None] for p in PRODUCTS)
    plain = statistics.median(seconds["plain"])
    return {
        "model": name,
        "parameters": trees.size(trees.split(state.params).differentiable),
        "plain_ms": 1e3 * plain,
        **{f"{p}_units": statistics.median(seconds[p]) / plain for p in PRODUCTS},
        **{f"{p}_mib": peaks[p] / 2**20 for p in PRODUCTS},
        "relative_difference": float(
            (
                trees.squared_norm([a - b for a, b in zip(reference, other, strict=True)])
                / trees.squared_norm(reference)
            ).sqrt()
        ),
        "chosen": chosen,
    }


def as_markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The table with the command that made it."""
    lines = [
        "# Two ways back through one inner step",
        "",
        "`python benchmarks/products.py`: process time in units of one plain step, medians of "
        f"{REPEATS}; peak of live tensors; one thread, float32. {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "",
        "| model | parameters | plain step, ms | reverse, units | mixed, units | reverse, MiB | mixed, MiB | "
        'difference in dB | `product="auto"` takes |',
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['plain_ms']:.1f} | {row['reverse_units']:.1f} | "
            f"{row['mixed_units']:.1f} | {row['reverse_mib']:.1f} | {row['mixed_mib']:.1f} | "
            f"{row['relative_difference']:.0e} | {row['chosen']} |"
        )
    lines += [
        "",
        "The mixed product needs the gradient first, to know the cotangent that the update sends to it, and then its "
        "tangent: 3 + 9 passes' worth of arithmetic where reverse over reverse takes 3 + 6. It keeps no graph of the "
        "gradient, which pays where the graph holds more than the activations and their tangents.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
