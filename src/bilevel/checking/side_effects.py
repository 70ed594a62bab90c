"""What an estimate must not do to the user's objects, and what a loss reads from outside of its arguments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import trees
from bilevel.checking.subject import Subject
from bilevel.report.findings import Finding, Verdict
from bilevel.unrolling import outside_reads

PART = "your objects"


class Snapshot:
    """The tensors, modes and gradients of the modules and batches that a user handed over."""

    def __init__(self, subject: Subject) -> None:
        descent = subject.run.problem.as_gradient_descent
        places = [subject.meta, subject.outer_batch]
        if descent is not None and not descent._builds_params:
            places.append(descent._make_params(None))
        self._tensors: list[tuple[str, Tensor, int, float]] = []
        self._modes: list[tuple[str, nn.Module, bool]] = []
        for place in places:
            for leaf in trees.leaves(place):
                if isinstance(leaf, nn.Module):
                    self._modes += [(name, layer, layer.training) for name, layer in leaf.named_modules()]
                    for name, tensor in [*leaf.named_parameters(), *leaf.named_buffers()]:
                        self._note(name, tensor)
                elif isinstance(leaf, Tensor):
                    self._note("a tensor", leaf)
        self._generator = torch.get_rng_state()

    def _note(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_inference():
            self._tensors.append((name, tensor, tensor._version, _sum(tensor)))

    def changes(self) -> Iterator[Finding]:
        """Yield a row that says what has changed since."""
        changed = [n for n, t, version, total in self._tensors if t._version != version or _sum(t) != total]
        changed += [f"the mode of {name}" for name, layer, training in self._modes if layer.training != training]
        if not torch.equal(self._generator, torch.get_rng_state()):
            changed.append("torch's random state")
        tested = "modules, batches and random state"
        if changed:
            found = f"changed by an estimate: {', '.join(changed[:4])}"
            yield Finding(PART, tested, Verdict.WRONG, found, "report this with Report.save")
        else:
            yield Finding(PART, tested, Verdict.RIGHT, "as they were")


def _sum(tensor: Tensor) -> float:
    value = tensor.detach()
    return float(torch.nan_to_num(value.real if value.is_complex() else value.double()).double().sum())


def find_outside_reads(subject: Subject) -> Iterator[Finding]:
    """Yield rows on meta parameters and graphs that losses read from outside of their arguments."""
    run = subject.run
    known: Any = outside_reads._WATCHED
    known.pop(run.problem, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = run.descend(run.start(), 0, min(1, run.steps))
        run.outer_loss(state, run.meta)
    messages = [str(w.message) for w in caught if "from outside of its arguments" in str(w.message)]
    for message in messages:
        first = message.split(". ")[0]
        advice = "read it from the argument meta, or write .detach() after it if a constant is meant"
        yield Finding("outside reads", "meta parameters", Verdict.UNJUDGED, first, advice)
    if not messages:
        yield Finding("outside reads", "meta parameters", Verdict.RIGHT, "none is read from outside of the arguments")
