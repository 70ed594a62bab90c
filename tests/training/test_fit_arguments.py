"""Wrong arguments of `fit` are named and leave nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import QUADRATIC, START, exact, train
from torch import Tensor, nn

import bilevel
from bilevel import (
    Phase,
    Reverse,
)
from bilevel.training import (
    metrics,
)

LBFGS = "LBFGS evaluates the loss several times in a step"


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no phases": ({"phases": []}, ValueError, r"phases=\[\]: write phases=\[bilevel.Phase\("),
    "an estimator as phase": ({"phases": [Reverse()]}, ValueError, r"phases=\[Reverse.*write phases=\[bilevel.Phase\("),
    "a phase without a list": ({"phases": Phase(Reverse(), 3)}, ValueError, r"write phases=\[bilevel.Phase\("),
    "checkpoints never": ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0: a whole number of at least 1"),
    "half a step": ({"checkpoint_every": 1.5}, ValueError, r"checkpoint_every=1\.5: a whole number of at least 1"),
    "negative seed": ({"seed": -1}, ValueError, "seed=-1: a whole number of at least 0"),
    "LBFGS": ({"optimizer": bilevel.optimizer(torch.optim.LBFGS)}, ValueError, LBFGS),
    "an optimiser's class": ({"optimizer": torch.optim.Adam}, TypeError, r"write optimizer=bilevel.optimizer\("),
    "an optimiser": (
        {"optimizer": torch.optim.SGD([nn.Parameter(START.clone())])},
        TypeError,
        r"write optimizer=bilevel.optimizer\(",
    ),
    "settings from meta": (
        {"optimizer": bilevel.optimizer(torch.optim.SGD, lr=lambda meta: meta)},
        ValueError,
        "lr: only an inner optimiser can take settings that are functions of meta",
    ),
    "whole numbers": ({"meta": {"x": torch.tensor([1, 2])}}, TypeError, r"meta\['x'\] has dtype torch.int64"),
    "complex numbers": ({"meta": torch.tensor([1j])}, TypeError, "meta has dtype torch.complex64"),
    "a number": ({"meta": {"lr": 1, "x": START}}, TypeError, r"meta\['lr'\] is 1 \(int\)"),
    "no tensor": ({"meta": {}}, ValueError, "meta is {}, without a single number"),
    "nothing": ({"meta": None}, ValueError, "meta is None"),
    "a path in config": (
        {"config": {"where": Path("a")}},
        TypeError,
        "a checkpoint holds .* not PosixPath|WindowsPath",
    ),
    "several outer losses": (
        {"problem": replace(QUADRATIC, outer_loss=lambda theta, *_: theta[:2] ** 2)},
        ValueError,
        "fit descends on one outer loss",
    ),
    "no steps": ({"inner_batches": []}, ValueError, "inner_batches is empty"),
    "a shape that differs": ({"project": lambda phi: phi[:2]}, ValueError, r"project returned .*\(2,\).*\(3,\)"),
    "a projection of nothing": ({"project": lambda phi: None}, ValueError, "project returned None"),
    "a projection that broadcasts": ({"project": torch.sum}, ValueError, r"project returned {'meta': \(\)}"),
    "a projection to a number": ({"project": lambda phi: 3.0}, ValueError, "project returned .*meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    changes, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        train(**{"phases": exact(2), "out": tmp_path / "out", **changes})
    assert not any(tmp_path.iterdir())


WRONG_PHASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **{
        f"{name}={value}": ({name: value}, ValueError, f"{name}={value}: a whole number of at least 1 is needed")
        for name in ("steps", "accumulate", "patience")
        for value in (0, -3, 2.5, True)
    },
    "no steps": ({"steps": None}, ValueError, "steps=None: a whole number"),
    "an estimator's class": ({"estimator": Reverse}, TypeError, r"write Phase\(bilevel.Reverse\(\), steps=100\)"),
    "a name": ({"estimator": "reverse"}, TypeError, r"write Phase\(bilevel.Reverse\(\), steps=100\)"),
    **{
        f"min_improvement={value}": ({"min_improvement": value}, ValueError, rf"min_improvement={value}: a number in")
        for value in (-0.1, 1, 1.5, float("nan"))
    },
}


@pytest.mark.parametrize("name", WRONG_PHASES)
def test_a_wrong_phase(name: str) -> None:
    changes, error, message = WRONG_PHASES[name]
    with pytest.raises(error, match=message):
        Phase(**{"estimator": Reverse(), "steps": 3, **changes})


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """The tests' own precision is float64 throughout, and torch's default stays what users have."""
    assert torch.get_default_dtype() == torch.float32
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def ctrl_c_heeded() -> Iterator[None]:
    """A program that a shell has put into the background is started with SIGINT ignored, and tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_heeded")
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, bilevel.errors.Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_being_stopped_inside_of_torchs_own_code_is_reported_as_such(
    number: int, expected: type[BaseException], tmp_path: Path
) -> None:
    """What a signal raises in a function that PyTorch calls from C++ comes out of it as a RuntimeError."""
    calls: list[int] = []

    def outer_loss(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            try:
                os.kill(os.getpid(), number)
            except BaseException as error:
                raise RuntimeError(f"an operation failed: {error!r}") from None
        return (theta - 3.0) ** 2

    problem = bilevel.GradientDescent(
        lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
        outer_loss,
        torch.tensor(0.0),
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    phases = [bilevel.Phase(bilevel.Reverse(), steps=10)]
    with pytest.raises(expected):
        bilevel.fit(problem, torch.tensor(0.0), bilevel.no_batches(2), phases=phases, out=tmp_path, progress=False)
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    kept = len(metrics.read(tmp_path / metrics.FILE))
    assert 0 < kept < 10
    result = bilevel.fit(
        problem,
        torch.tensor(0.0),
        bilevel.no_batches(2),
        phases=phases,
        out=bilevel.RunFolder(tmp_path, resume=True),
        progress=False,
    )
    assert [row["outer_step"] for row in result.history] == list(range(10))
