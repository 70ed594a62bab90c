"""Peak memory of one hypergradient of online-lm against T, by method, with random weights.

    python benchmarks/online_lm_memory.py                    # the preset tiny's model
    python benchmarks/online_lm_memory.py --model gpt2 --steps 6 24 --limit 10 --name online_lm_memory_gpt2

Memory depends on shapes, not on what the weights say, so no pretrained weights are needed. Every measurement is a
process of its own, which makes one warm-up call at T = 2 and reports how far its resident memory rose during the call
that counts, as in `benchmarks/memory.py`. With --limit, a process that needs more memory ends, and the table says so.
Writes `benchmarks/results/online_lm_memory.json` and `.md`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from memory import RETURNING_ALLOCATOR, measure_memory
from rich.console import Console
from rich.markdown import Markdown
from transformers import GPT2Config, GPT2LMHeadModel

import bilevel
from bilevel import trees
from bilevel.estimators import Estimator
from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.problem import OuterBatch, problem
from bilevel.tasks.online_lm.tokens import padded
from bilevel.tasks.online_lm.weight_model import WeightModel
from bilevel.tasks.running import versions

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, Callable[[], Estimator]] = {
    "ForwardGradient(1)": lambda: bilevel.ForwardGradient(1),
    'Reverse("sqrt")': lambda: bilevel.Reverse("sqrt"),
    'Reverse("log")': lambda: bilevel.Reverse("log"),
    "Reverse(4)": lambda: bilevel.Reverse(4),
    'Reverse("graph")': lambda: bilevel.Reverse("graph"),
}
MODELS: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 1275, "n_positions": 72, "n_embd": 128, "n_layer": 1, "n_head": 4},
    "small": {"vocab_size": 8000, "n_positions": 256, "n_embd": 256, "n_layer": 4, "n_head": 4},
    "distilgpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 6, "n_head": 12},
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
}


@dataclass(frozen=True)
class Options:
    """Peak memory against T, by method."""

    model: str = "tiny"
    """The shape: tiny, small, distilgpt2 or gpt2."""
    steps: tuple[int, ...] = (6, 24, 48, 96)
    """T."""
    tokens: int = 48
    """Tokens of a document."""
    methods: tuple[str, ...] = field(default=tuple(METHODS))
    """Which to measure."""
    limit: float | None = None
    """GiB that a process may allocate, models and all."""
    name: str = "online_lm_memory"
    """Of the files in benchmarks/results."""
    child: bool = False
    """Measure the first of the methods at the first T and print it (what the processes do)."""


def main() -> None:
    options = tyro.cli(Options)
    if options.child:
        print(json.dumps(measured(options)))
        return
    rows = []
    with bar("measurements", len(options.steps) * len(options.methods)) as shown:
        for method in options.methods:
            for steps in options.steps:
                rows.append(in_child(options, method, steps))
                shown.advance(f"{method}, T = {steps}: {cell(rows[-1], options)}")
    command = " ".join(["python benchmarks/online_lm_memory.py", *sys.argv[1:]])
    write_json(RESULTS / f"{options.name}.json", {"command": command, "versions": versions(), "rows": rows})
    text = as_markdown(rows, options, command)
    write_text(RESULTS / f"{options.name}.md", text)
    Console().print(Markdown(text))


def in_child(options: Options, method: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", "--model", options.model, "--tokens", str(options.tokens)]
    command += ["--methods", method, "--steps", str(steps)]
    command += [] if options.limit is None else ["--limit", str(options.limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **RETURNING_ALLOCATOR}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} at T = {steps} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: Options) -> dict[str, Any]:
    """In a process of its own: one method at one T; of what does not fit, the method and T alone."""
    if options.limit is not None:
        most = int(options.limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        return _measured(options)
    except RuntimeError as error:
        if options.limit is None or "can't allocate memory" not in str(error):
            raise
        return {"method": options.methods[0], "steps": options.steps[0], "extra_bytes": None}


def _measured(options: Options) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    shape = MODELS[options.model]
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": options.model != "tiny"}
    model = GPT2LMHeadModel(GPT2Config(**shape, **rates, **ends)).eval()
    weight_model = WeightModel.on_top_of(model)
    task = problem(OnlineLM(inner_lr=1e-3), model)
    documents = torch.randint(shape["vocab_size"], (max(options.steps), 1, options.tokens))
    batch = outer_batch(model, shape["vocab_size"])
    (method,), (steps,) = options.methods, options.steps
    seconds = [0.0]

    def call(count: int) -> None:
        began = time.process_time()
        METHODS[method]()(task, weight_model, [documents[t] for t in range(count)], batch)
        seconds[0] = time.process_time() - began

    found = measure_memory(call, 2, steps)
    sizes = {
        "inner_parameters": sum(p.numel() for p in model.parameters()),
        "meta_parameters": trees.size([p.detach() for p in weight_model.parameters()]),
    }
    return {"method": method, "steps": steps, **found, **sizes, "process_seconds": round(seconds[0], 2)}


def outer_batch(model: Any, vocabulary: int) -> OuterBatch:
    """Eight questions of 16 tokens, two of them the answer, and two other texts of 32 tokens."""
    asked = torch.randint(vocabulary, (8, 16)).tolist()
    other = torch.randint(vocabulary, (2, 32)).tolist()
    questions = padded(asked, [[-100] * 14 + ids[14:] for ids in asked], 0)
    locality = padded(other, other, 0)
    with torch.no_grad():
        before = model(input_ids=locality.ids, attention_mask=locality.mask).logits.log_softmax(-1)
    return OuterBatch(questions, locality, before)


def as_markdown(rows: Sequence[Mapping[str, Any]], options: Options, command: str) -> str:
    """A line for each method, a column for each T."""
    first = rows[0]
    state = 4 * first["inner_parameters"] / 2**20
    lines = [
        "# Memory of one hypergradient of online-lm",
        "",
        f"`{command}`: MiB that the resident memory rises in a call, one thread, float32, random weights; "
        f"the model `{options.model}` has {first['inner_parameters']:,} parameters ({state:.1f} MiB a state), "
        f"the weight model {first['meta_parameters']:,}; one document of {options.tokens} tokens per step. In "
        "brackets process seconds, with an allocator that hands back all memory at once, so slower than usual.",
        "",
        "| method | " + " | ".join(f"T = {steps}" for steps in options.steps) + " |",
        "| --- | " + "--- | " * len(options.steps),
    ]
    for method in options.methods:
        found = [row for row in rows if row["method"] == method]
        lines.append(f"| `{method}` | {' | '.join(cell(row, options) for row in found)} |")
    return "\n".join(lines) + "\n"


def cell(row: Mapping[str, Any], options: Options) -> str:
    """MiB and seconds, or that it did not fit."""
    if row["extra_bytes"] is None:
        return f"does not fit into {options.limit:g} GiB"
    return f"{row['extra_bytes'] / 2**20:.0f} ({row['process_seconds']:.1f})"


if __name__ == "__main__":
    main()
