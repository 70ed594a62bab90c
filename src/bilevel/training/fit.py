"""`fit` trains meta parameters by a `torch.optim` optimiser on estimated hypergradients."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from bilevel import checks, distributed, randomness
from bilevel.distributed.workers import Workers
from bilevel.errors import NonFiniteError, SolverError, Terminated
from bilevel.estimators import Estimator
from bilevel.optim.update_rule import Optimizer
from bilevel.optim.update_rule import optimizer as make_optimizer
from bilevel.problem import BilevelProblem, Unrollable, as_problem
from bilevel.report.progress import bar
from bilevel.training.accumulation import Draws
from bilevel.training.kept import Keep, check_keep
from bilevel.training.outer_loop import OuterLoop, OuterStep
from bilevel.training.outer_state import identity
from bilevel.training.phases import Phase, phases_of
from bilevel.training.result import FitResult
from bilevel.training.run_record import RunRecord
from bilevel.training.settings import OuterUpdate, RunFolder, as_run_folder
from bilevel.training.termination import Stop, stopping_raises
from bilevel.unrolling.short_check import fitting


def fit(
    problem: BilevelProblem | Unrollable,
    meta: Any,
    inner_batches: Any = None,
    outer_batch: Any = None,
    seed: int = 0,
    *,
    estimator: Estimator | None = None,
    steps: int | None = None,
    phases: Sequence[Phase] | None = None,
    optimizer: Optimizer | None = None,
    update: OuterUpdate | None = None,
    stream: bool | int = False,
    out: str | Path | RunFolder | None = None,
    callbacks: Sequence[Callable[[OuterStep], None]] = (),
    progress: bool = True,
    workers: Workers | None = None,
    keep: Keep = "last",
) -> FitResult:
    """Train the meta parameters: φ ← Ψ(φ, estimate of ∇h(φ)), where Ψ is any `torch.optim` optimiser.

    Args:
        problem: as in the call of an estimator.
        meta: φ to start from: a tensor, a tree of tensors, or an `nn.Module`; NumPy arrays and Python floats are taken
            too, and come back as such.
        inner_batches: T batches by random access, the same for every outer step; or the whole number T for a problem
            without data; or a function that returns either from the number of the estimate (0, 1, 2, …); or batches
            of a dataset by `bilevel.epochs`, in another order for each estimate.
        outer_batch: a batch; or a function that returns a batch from the number of the estimate; or `bilevel.epochs`.
        seed: determines every random number of the run. Each estimate has a seed of its own, a function of (seed, outer
            step, number within the step).
        estimator: the method that estimates the hypergradient in every outer step. Pass it with `steps`.
        steps: the number of outer steps.
        phases: instead of `estimator` and `steps`, several stretches of the outer loop with an estimator each:
            `[Phase(estimator, steps), …]`. The outer optimiser keeps its state from phase to phase.
        optimizer: the outer optimiser Ψ, by default `bilevel.optimizer(torch.optim.Adam, lr=1e-2)`. Its schedule
            advances once per outer step.
        update: a projection, the clipping of hypergradients, and backtracking: see `OuterUpdate`.
        stream: treat the inner loop as one long history, of which every estimate takes the next T steps. An estimate
            then starts from the state in which the one before ended. Estimators take that state as a constant;
            `StreamingForwardGradient`, `PersistentES`, `SingleLoop` and `Penalty` also carry something of their own. A
            whole number K starts the inner loop over after every K estimates, with other random numbers.
        out: the folder into which the run is written, with checkpoints: a path, or a `RunFolder` with its settings.
        callbacks: functions that are called after each outer step, with a `bilevel.training.outer_loop.OuterStep`. A
            callback ends the run by `step.stop()`.
        progress: show a progress bar.
        workers: the processes that share the work. By default these are the processes that torchrun started
            (`bilevel.experimental.join_workers()`). Each of them calls `fit` with the same arguments. The first worker
            writes the files, shows the progress and calls the callbacks. A group that torchrun restarts resumes by
            itself.
        keep: which meta parameters are returned: the `"last"` ones; the `"best"` ones by the outer loss of their
            estimate, the last ones included (which costs T units more, except in a stream); or a function from the
            `OuterStep` to a number, the smaller the better, which is called after each step and is the `kept_by` of the
            row: `keep=lambda step: -accuracy(step.meta)`.

    A run in a folder can be made longer: resume it with more `steps`, or with a longer last phase.

    Returns:
        The trained meta parameters and a row of numbers for each outer step.

    Before the first outer step, a short check takes three inner steps beside a plain PyTorch loop and compares
    derivatives of one step with differences. It costs at most 12 inner gradients, once in a process for each kind of
    problem. See `bilevel.experimental.short_check`.

    Raises:
        CheckError: the short check found the inner loop, or a derivative of a step, to be wrong.
        NonFiniteError, SolverError: an estimate is not finite, or a black box failed. The checkpoint holds the meta
            parameters before it.
        CheckpointError: the checkpoint to resume from is damaged or belongs to another configuration.
        WorkerError: another worker failed, died or did not answer in time. The checkpoint is of the last complete step.
        FileExistsError: `out` already holds a run, and `resume` is false.

    >>> import bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: 0.5 * (theta - 3.0) ** 2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> result = bilevel.fit(
    ...     problem, torch.tensor(0.0), 10, estimator=bilevel.Reverse(), steps=50, progress=False,
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> result.meta
    tensor(3.0029)
    """
    problem, update, folder = as_problem(problem), update or OuterUpdate(), as_run_folder(out)
    phases = phases_of(estimator, steps, phases)
    randomness.check_seed(seed)
    _require_update(update)
    check_keep(keep)
    _require_stream(problem, stream, update)
    if optimizer is None:
        optimizer = make_optimizer(torch.optim.Adam, lr=1e-2)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is {optimizer!r}; write optimizer=bilevel.optimizer(torch.optim.Adam, lr=1e-2)")
    workers = distributed.join_workers() if workers is None else workers
    loop = OuterLoop(Draws(problem, inner_batches, outer_batch, seed, stream), meta, phases, optimizer, update, keep)
    _require_same_start(workers, loop, folder)
    resumes = folder is not None and workers.any("resuming", folder.resume or distributed.restarted())
    record = workers.together(
        "the start of the run", lambda: RunRecord(loop, folder if workers.first else None, resumes)
    )
    every = 1 if folder is None else folder.checkpoint_every
    try:
        record.share(workers)
        with stopping_raises() as stop, workers.sharing(), fitting():
            _to_the_end(loop, record, workers, callbacks, every, stop, progress)
    except BaseException as error:
        # A first step that fails, on its arguments for instance, writes no checkpoint.
        if record.rows or isinstance(error, KeyboardInterrupt | Terminated | NonFiniteError | SolverError):
            # If nothing can be written, the first such error is the one to report.
            with suppress(OSError) if isinstance(error, OSError) else nullcontext():
                record.save()
        raise
    finally:
        record.close()
    loop.offer_last()
    return FitResult(loop.user_meta(write_modules=True), record.rows)


def _require_update(update: OuterUpdate) -> None:
    """Raise unless the update is one."""
    if not isinstance(update, OuterUpdate):
        raise TypeError(f"update is {update!r}; write update=bilevel.OuterUpdate(clip_norm=1.0)")


def _require_stream(problem: BilevelProblem, stream: bool | int, update: OuterUpdate) -> None:
    """Raise for settings that a stream does not allow."""
    if not isinstance(stream, bool):
        checks.whole_number(stream, "stream")
    if stream and problem.is_black_box:
        raise ValueError("stream=True needs inner steps to go on with, and a BlackBox solves from the beginning")
    if stream and update.max_backtracks:
        raise ValueError(
            f"max_backtracks={update.max_backtracks} with stream=True: the inner steps of a stream are not computed "
            "twice; choose one of the two"
        )


def _to_the_end(
    loop: OuterLoop,
    record: RunRecord,
    workers: Workers,
    callbacks: Sequence[Callable[[OuterStep], None]],
    checkpoint_every: int,
    stop: Stop,
    progress: bool,
) -> None:
    """Take all remaining outer steps. All workers take and record each step together."""
    phases = len(loop.progress.phases)
    with bar("outer steps", loop.progress.total_steps, loop.progress.outer_step, progress and workers.first) as shown:
        stopped = False
        while not (loop.progress.finished or stopped):
            step = workers.together(
                f"outer step {loop.progress.outer_step}",
                lambda: _outer_step(loop, record, callbacks if workers.first else (), checkpoint_every, stop),
            )
            numbers = struct.pack("dd", step.row["outer_loss"], step.row["grad_norm"])
            workers.require_same(f"the numbers of outer step {loop.progress.outer_step - 1}", numbers)
            stopped = workers.any("stopping", step.stops) if callbacks else step.stops
            shown.advance(
                f"outer loss {step.row['outer_loss']:.4g}",
                f"phase {step.row['phase'] + 1} of {phases}" if phases > 1 else None,
                loop.progress.total_steps,
            )


def _outer_step(
    loop: OuterLoop,
    record: RunRecord,
    callbacks: Sequence[Callable[[OuterStep], None]],
    checkpoint_every: int,
    stop: Stop,
) -> OuterStep:
    with stop.as_such():
        step = loop.advance()
    if (value := loop.kept.measure(step)) is not None:
        step.row["kept_by"] = value
        loop.kept.offer(value, loop.parameters)
    for callback in callbacks:
        callback(step)
    record.add(step.row)
    if step.stops or loop.progress.outer_step % checkpoint_every == 0 or loop.progress.finished:
        record.save()
    return step


def _require_same_start(workers: Workers, loop: OuterLoop, folder: RunFolder | None) -> None:
    """Raise unless all workers have the same settings and start from the same meta parameters."""
    config = {} if folder is None else folder.config
    workers.require_same("the settings of the run", repr(identity(loop, config)).encode())
    numbers = [t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in loop.parameters]
    workers.require_same("the meta parameters at the start", b"".join(numbers))
