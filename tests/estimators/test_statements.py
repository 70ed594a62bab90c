"""What an estimator says about itself: whether it is random, and how its directions are redrawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from closed_forms import descent, tensor
from torch import Tensor

import bilevel
from bilevel import Auto, ForwardGradient, Phase, Reverse, trees
from bilevel.comparison.compare import ComparisonRow
from bilevel.training import accumulation
from bilevel.unrolling.unroll import Unroll, unroll

CASE = descent("plain")


@dataclass(frozen=True)
class Unusual(bilevel.Estimator):
    """A random estimator whose settings have names that no other estimator has."""

    probes: int = 1
    lot: int = 0
    is_random: ClassVar[bool] = True

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return ForwardGradient(self.probes).units(steps, meta_size)

    def redrawn(self, number: int) -> Unusual:
        return replace(self, lot=self.lot + number)

    def _estimate(self, run: Unroll) -> bilevel.Estimate:
        found = ForwardGradient(self.probes, draw=self.lot)._estimate(run)
        return replace(found, standard_error=None)  # so that nothing but its own statement says that it is random


# -- random or not -------------------------------------------------------------------------------------------------


def test_an_estimator_must_say_whether_it_is_random() -> None:
    with pytest.raises(TypeError, match="Silent does not say whether it draws random directions"):

        class Silent(bilevel.Estimator):
            pass


def test_a_random_estimator_must_say_how_it_is_redrawn() -> None:
    class Forgetful(Unusual):
        redrawn = bilevel.Estimator.redrawn  # type: ignore[assignment]

    assert Forgetful().redrawn(0) == Forgetful()
    with pytest.raises(NotImplementedError, match=r"Forgetful is random, so it must define redrawn\(number\)"):
        Forgetful().redrawn(1)


@pytest.mark.parametrize("variate", [Unusual(), Auto(), (Reverse(), Unusual())], ids=str)
def test_random_estimators_are_no_control_variates_whatever_their_settings_are_called(variate: Any) -> None:
    with pytest.raises(ValueError, match="must not depend on random directions"):
        ForwardGradient(2, control_variate=variate)
    with pytest.raises(ValueError, match="must not depend on random directions"):
        bilevel.CoarserProblem(estimator=Unusual())


def compared(estimator: bilevel.Estimator, repeats: int) -> ComparisonRow:
    (row,) = bilevel.compare(
        CASE.problem, CASE.meta, CASE.inner_batches, tensor(CASE.outer.a), estimators=[estimator], repeats=repeats
    )
    return row


def test_compare_draws_anew_whatever_the_settings_are_called() -> None:
    found, usual = compared(Unusual(), repeats=5), compared(ForwardGradient(), repeats=5)
    assert found.repeats == 5
    assert (found.variance, found.squared_bias) == (usual.variance, usual.squared_bias)
    assert found.variance is not None
    assert found.variance > 0
    once = compared(Unusual(), repeats=1)
    assert (once.variance, once.squared_bias) == (None, None)  # of one draw nobody can tell them apart


def test_compare_draws_anew_what_auto_has_chosen() -> None:
    assert compared(Auto("1GB"), repeats=5).repeats == 1  # Reverse fits
    assert compared(Auto(SMALL, directions=2), repeats=5).repeats == 5


SMALL = "350B"
"""Memory in which only random directions fit for `CASE`."""


def inner_loop() -> Unroll:
    return unroll(CASE.problem, CASE.meta, CASE.inner_batches, tensor(CASE.outer.a), 0)


def test_auto_is_what_it_chooses() -> None:
    run = inner_loop()
    assert Auto("1GB").resolved(run) == Reverse("graph")
    small = Auto(SMALL, directions=2).resolved(run)
    assert small.is_random
    assert small.redrawn(3) != small
    with pytest.raises(TypeError, match="Auto has no cost of its own"):
        Auto().units(5, 4)


# -- what that decides in training ---------------------------------------------------------------------------------


class TwoWorkers:
    """The first of two workers, without the other one: notes what they would do together."""

    size, rank, first = 2, 0, True

    def __init__(self) -> None:
        self.together_at: list[str] = []

    def share(self, count: int) -> range:
        return range(0, count, 2)

    def together(self, what: str, function: Callable[[], Any]) -> Any:
        self.together_at.append(what)
        return function()

    def sum(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:  # noqa: ARG002
        return list(tensors)


@pytest.mark.parametrize(
    ("estimator", "shared"),
    [(Reverse(), True), (Auto("1GB"), True), (Auto(SMALL, directions=2), False), (Unusual(), False)],
    ids=str,
)
def test_workers_share_estimates_of_deterministic_methods_alone(
    estimator: bilevel.Estimator, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = estimator if isinstance(estimator, Unusual) else estimator.resolved(inner_loop())
    assert estimator.is_random != shared
    workers = TwoWorkers()
    monkeypatch.setattr(accumulation.distributed, "current", lambda: workers)
    draws = accumulation.Draws(CASE.problem, CASE.inner_batches, tensor(CASE.outer.a), seed=0)
    made: list[bilevel.Estimator] = []

    def these(numbers: Sequence[int], estimator: bilevel.Estimator, *_: Any) -> accumulation.Estimates:
        made.extend(estimator for _ in numbers)
        ones = [torch.ones_like(leaf) for leaf in trees.leaves(CASE.meta)]
        return accumulation.Estimates(ones, [0.0] * len(numbers), [None] * len(numbers), None)  # type: ignore[arg-type]

    monkeypatch.setattr(draws, "_these", these)
    draws.estimates(estimator, 4, CASE.meta, outer_step=0)
    assert ("accumulated estimates" in workers.together_at) == shared
    assert made == [estimator] * (2 if shared else 4)


def test_auto_goes_on_in_a_stream() -> None:
    def losses(estimator: bilevel.Estimator) -> list[float]:
        result = bilevel.fit(
            CASE.problem,
            CASE.meta,
            CASE.inner_batches,
            tensor(CASE.outer.a),
            phases=[Phase(estimator, 4)],
            optimizer=bilevel.optimizer(torch.optim.SGD, lr=1e-300),
            stream=True,
            progress=False,
        )
        return [row["outer_loss"] for row in result.history]

    assert losses(Auto("1GB")) == losses(Reverse())
    assert len(set(losses(Reverse()))) == 4
