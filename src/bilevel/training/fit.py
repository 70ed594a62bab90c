"""`fit`: the meta parameters are trained by a `torch.optim` optimiser on estimated hypergradients."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bilevel import checks, distributed, randomness
from bilevel.distributed.workers import Workers
from bilevel.errors import NonFiniteError, SolverError, Terminated
from bilevel.optim.update_rule import Optimizer
from bilevel.optim.update_rule import optimizer as make_optimizer
from bilevel.problem import BlackBox, Unrollable
from bilevel.report.progress import bar
from bilevel.training.accumulation import Draws
from bilevel.training.metrics import Row
from bilevel.training.outer_loop import OuterLoop, OuterStep
from bilevel.training.outer_state import identity
from bilevel.training.phases import Phase
from bilevel.training.run_record import RunRecord
from bilevel.training.termination import Stop, stopping_raises


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind."""

    meta: Any
    """The trained meta parameters, in the form `fit` was given; an `nn.Module` is trained in place."""
    history: list[Row]
    """One dict for each outer step: `outer_step`, `phase`, `outer_loss`, `grad_norm`, `standard_error`,
    `signal_to_noise`, `seconds`; `retreats` and `clipped_to` where they were asked for; with
    `compile=True` also `compile_seconds`, which `seconds` leaves out."""


def fit(
    problem: Unrollable | BlackBox,
    meta: Any,
    inner_batches: Any = None,
    outer_batch: Any = None,
    seed: int = 0,
    *,
    phases: Sequence[Phase],
    optimizer: Optimizer | None = None,
    project: Callable[[Any], Any] | None = None,
    stream: bool = False,
    retreats: int = 0,
    clip_norm: float | None = None,
    callbacks: Sequence[Callable[[OuterStep], None]] = (),
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 50,
    config: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    workers: Workers | None = None,
) -> FitResult:
    """Train the meta parameters: φ ← Ψ(φ, estimate of ∇h(φ)), with Ψ any `torch.optim` optimiser.

    Args:
        problem: as in the call of an estimator.
        meta: φ to start from: a tensor, a tree of tensors, or an `nn.Module`.
        inner_batches: T batches by random access, the same for every outer step; or a function from the number of the
            draw (0, 1, 2, …: estimates made so far) to such a sequence.
        outer_batch: a batch; or a function from the number of the draw to a batch.
        phases: what estimates the hypergradient, and for how long. The outer optimiser's state goes on through them.
        seed: determines every random number of the run; each estimate gets a seed of its own, a function of (seed,
            outer step, number within the step).
        optimizer: the outer optimiser, `bilevel.optimizer(torch.optim.Adam, lr=1e-2)` by default. Its schedule
            advances once per outer step.
        project: maps the meta parameters to the nearest allowed ones after each step: `lambda x: x.clamp(0, 1)`.
        stream: the inner loop is one long history, of which every estimate takes the next T steps: it goes on from the
            state where the one before ended, instead of from the start. Estimators see their own window alone, with
            that state as a constant, but for `ForwardGradient(..., carry=...)`, whose tangents go on as well.
        retreats: where the inner loop fails (`NonFiniteError`, `SolverError`), go back half of the outer step that led
            there and try again, so many times at most; counted in `history` as `retreats`. 0: such an error ends the
            run. The outer optimiser's own memory stays as it is.
        clip_norm: shorten a hypergradient that is longer than this to this length, before the outer optimiser sees it.
            Where the inner loop is chaotic for some draws, one exploding estimate would otherwise stay in Adam's second
            moment for hundreds of steps. `history` keeps the full `grad_norm`, and as `clipped_to` the factor, 1 where
            nothing was cut. Clipped estimates are biased. None: nothing is cut.
        callbacks: called after each outer step.
        out: a folder for `metrics.jsonl`, `checkpoint.safetensors` (and the one before) and TensorBoard events.
        resume: go on from the checkpoint in `out` (or start, if there is none); the numbers that follow are those of a
            run that was never interrupted.
        checkpoint_every: outer steps between two checkpoints; one is also written at the end, on interruption
            (Ctrl-C, SIGTERM) and on an error.
        config: further settings that a checkpoint must agree with to be resumed.
        tensorboard: write events into `out`/tensorboard.
        progress: show a progress bar.
        workers: who shares the work; `bilevel.join_workers()` by default, so those that torchrun started. Every one of
            them calls `fit` with the same arguments. The first one writes the files, shows the progress and has its
            callbacks called. A group that torchrun restarted resumes by itself.

    Raises:
        NonFiniteError, SolverError: an estimate is not finite, or a black box failed; the meta parameters before it
            are in the checkpoint.
        CheckpointError: on resuming, the checkpoint is damaged or belongs to another configuration.
        WorkerError: another worker failed, died or did not come in time; the checkpoint is of the last complete step.
        FileExistsError: `out` holds a run already, and `resume` is false.

    >>> import bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: 0.5 * (theta - 3.0) ** 2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> result = bilevel.fit(
    ...     problem, torch.tensor(0.0), bilevel.no_batches(10), progress=False,
    ...     phases=[bilevel.Phase(bilevel.Reverse(), steps=50)], optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> result.meta
    tensor(3.0029)
    """
    _require_settings(problem, phases, checkpoint_every, seed, out is not None, resume or tensorboard, stream, retreats)
    if optimizer is None:
        optimizer = make_optimizer(torch.optim.Adam, lr=1e-2)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is {optimizer!r}; write optimizer=bilevel.optimizer(torch.optim.Adam, lr=1e-2)")
    workers = distributed.join_workers() if workers is None else workers
    retreats = checks.whole_number(retreats, "retreats", at_least=0)
    clip_norm = None if clip_norm is None else checks.positive(clip_norm, "clip_norm")
    draws = Draws(problem, inner_batches, outer_batch, seed, stream)
    loop = OuterLoop(draws, meta, list(phases), optimizer, project, retreats, clip_norm)
    _require_same_start(workers, loop, config or {})
    folder = Path(out) if out is not None and workers.first else None
    goes_on = out is not None and workers.any("resuming", resume or distributed.restarted())
    record = workers.together(
        "the start of the run", lambda: RunRecord(loop, folder, config or {}, goes_on, tensorboard and workers.first)
    )
    try:
        record.share(workers)
        with stopping_raises() as stop, workers.sharing():
            _to_the_end(loop, record, workers, callbacks, checkpoint_every, stop, progress)
    except BaseException as error:
        # A first step that fails, on its arguments for instance, leaves nothing behind.
        if record.rows or isinstance(error, KeyboardInterrupt | Terminated | NonFiniteError | SolverError):
            # Where nothing can be written, that is the error to report, and not that this was tried once more.
            with suppress(OSError) if isinstance(error, OSError) else nullcontext():
                record.save()
        raise
    finally:
        record.close()
    return FitResult(loop.user_meta(write_modules=True), record.rows)


def _require_settings(
    problem: Unrollable | BlackBox,
    phases: Sequence[Phase],
    checkpoint_every: int,
    seed: int,
    has_folder: bool,
    needs_folder: bool,
    stream: bool,
    retreats: int,
) -> None:
    """Raise for what `fit` was told that can't be, or does not go together."""
    if isinstance(phases, Phase) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"phases={phases!r}: write phases=[bilevel.Phase(bilevel.Reverse(), steps=100)]")
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every!r}: a whole number of at least 1 is needed")
    randomness.check_seed(seed)
    if needs_folder and not has_folder:
        raise ValueError("resume=True and tensorboard=True need out=FOLDER")
    if stream and isinstance(problem, BlackBox):
        raise ValueError("stream=True needs inner steps to go on with, and a BlackBox solves from the beginning")
    if stream and retreats:
        raise ValueError(f"retreats={retreats} with stream=True: the steps of a stream are not taken twice; take one")


def _to_the_end(
    loop: OuterLoop,
    record: RunRecord,
    workers: Workers,
    callbacks: Sequence[Callable[[OuterStep], None]],
    checkpoint_every: int,
    stop: Stop,
    progress: bool,
) -> None:
    """All outer steps that are left, each made and recorded by all workers together."""
    phases = len(loop.progress.phases)
    with bar("outer steps", loop.progress.total_steps, loop.progress.outer_step, progress and workers.first) as shown:
        while not loop.progress.finished:
            step = workers.together(
                f"outer step {loop.progress.outer_step}",
                lambda: _outer_step(loop, record, callbacks if workers.first else (), checkpoint_every, stop),
            )
            numbers = struct.pack("dd", step.row["outer_loss"], step.row["grad_norm"])
            workers.require_same(f"the numbers of outer step {loop.progress.outer_step - 1}", numbers)
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
    for callback in callbacks:
        callback(step)
    record.add(step.row)
    if loop.progress.outer_step % checkpoint_every == 0 or loop.progress.finished:
        record.save()
    return step


def _require_same_start(workers: Workers, loop: OuterLoop, config: Mapping[str, Any]) -> None:
    """All workers run the same, from the same meta parameters."""
    workers.require_same("the settings of the run", repr(identity(loop, config)).encode())
    numbers = [t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in loop.parameters]
    workers.require_same("the meta parameters at the start", b"".join(numbers))
