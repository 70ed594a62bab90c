"""The second part of a check: a step that is computed again gives what it gave before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.checking.subject import Subject, require_one_outer_loss
from bilevel.errors import ReplayError
from bilevel.report.findings import Finding, Verdict
from bilevel.unrolling.state_comparison import disagreement, distances, parts_of, same_bits

PART = "a step twice"
_ADVICE = (
    "keep memory in the inner state, compute batches from the number of the step, and draw random numbers from the "
    "global generators"
)


def compare_repeated_steps(subject: Subject) -> Iterator[Finding]:
    """Yield rows on batches, on steps out of order, and on the loop as a whole."""
    run, chosen = subject.run, subject.chosen_steps()
    changed = [t for t in chosen if not _same(run._fetch(t), run._fetch(t))]
    if changed:
        found = f"the batch of step {changed[0]} is another one when it is fetched again"
        yield Finding(PART, "batches", Verdict.WRONG, found, _ADVICE)
    else:
        yield Finding(PART, "batches", Verdict.RIGHT, f"those of steps {_listed(chosen)} are the same twice")
    try:
        yield from _steps(subject, chosen)
    except ReplayError as error:
        yield Finding(PART, "state and noise", Verdict.WRONG, str(error), _ADVICE)


@torch.enable_grad()
def _steps(subject: Subject, chosen: list[int]) -> Iterator[Finding]:
    run = subject.run
    state, kept = run.start(), {}
    for t in range(run.steps):
        after = run.descend(state, t, t + 1)
        if t in chosen:
            kept[t] = (state, after)
        state = after
    value = run.outer_loss(state, run.meta).detach()
    require_one_outer_loss(value)
    for t in reversed(chosen):  # out of order: a queue then holds something else
        before, after = kept[t]
        again = run.descend(before, t, t + 1)
        if not same_bits(after, again) and bool(disagreement(parts_of(after), before, after, again)[0]):
            off, moved = distances(before, after, again)
            found = f"step {t} gives another state when it is computed again: {off:.2g} apart, the step is {moved:.2g}"
            yield Finding(PART, "state and noise", Verdict.WRONG, found, _ADVICE, {"step": float(t), "apart": off})
            return
    yield Finding(PART, "state and noise", Verdict.RIGHT, f"steps {_listed(chosen)} give the same states again")
    yield _of_values(value, run.value()[0])


def compare_solves(subject: Subject) -> Iterator[Finding]:
    """Yield a row on a black box that is solved twice."""
    value = subject.run.value()[0]
    require_one_outer_loss(value)
    yield _of_values(value, subject.run.value()[0])


def _of_values(value: Tensor, again_value: Tensor) -> Finding:
    epsilon = torch.finfo(value.dtype).eps
    if abs(float(again_value) - float(value)) <= epsilon**0.5 * max(abs(float(value)), 1e-300) or value == again_value:
        return Finding(PART, "whole loop", Verdict.RIGHT, "the outer value is the same twice")
    found = f"the outer value is {float(value):.9g} first, and {float(again_value):.9g} then"
    return Finding(PART, "whole loop", Verdict.WRONG, found, _ADVICE)


def _same(left: Any, right: Any) -> bool:
    """Whether two batches hold the same numbers; objects that cannot be compared count as the same."""
    a, b = trees.leaves(left), trees.leaves(right)
    if len(a) != len(b):
        return False
    for one, other in zip(a, b, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape or not torch.equal(one.nan_to_num(), other.nan_to_num()):
                return False
        elif isinstance(one, float | int | str | bool) and one != other:
            return False
    return True


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
