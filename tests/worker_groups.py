"""Groups of workers for the tests: a program, because it forks, and a test process may have threads.

    python tests/worker_groups.py FOLDER
    python tests/worker_groups.py FOLDER fully-sharded

Runs everything below in groups of forked processes, which costs one import of torch in all, and leaves what happened in
FOLDER/happened.json. The second command runs what takes longest: modules under `fully_shard`, and their example.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from estimator_table import ROWS
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import cli, distributed, trees
from bilevel.experimental import Workers
from bilevel.optim.update_rule import Optimizer
from bilevel.training import metrics
from bilevel.training.outer_loop import OuterStep

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from kills import fork_group, train, wait_for_group  # pyright: ignore[reportMissingImports]

SIZES = (1, 2, 3)
PATIENT = 1800.0
"""Seconds for which a worker waits for another one, where nobody is meant to be given up: a machine may be busy."""
HUNG = 6.0
"""Seconds after which a worker gives up another one that sleeps until then."""


# -- estimates ---------------------------------------------------------------------------------------------------------


def weights_problem() -> tuple[bilevel.GradientDescent, dict[str, Tensor], Any]:
    """Weights of examples in a small network trained by momentum; φ is a tree with two leaves."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator)
    y = (x[:, 0] > 0).long()

    def inner_loss(model: Any, meta: Any, batch: Any) -> Tensor:
        losses = cross_entropy(model(x), y, reduction="none")
        return (meta["weights"].sigmoid() * losses).mean() + 0.1 * (meta["bias"] * model(x[:1])).sum()

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda model, meta, batch: cross_entropy(model(x), 1 - y) + meta["bias"].square().sum(),
        lambda meta: torch.nn.Linear(4, 2),
        bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    )
    meta = {"weights": torch.linspace(-1, 1, 12), "bias": torch.tensor([0.3, -0.2])}
    return problem, meta, bilevel.no_batches(4)


def black_box() -> bilevel.BlackBox:
    problem, _, batches = weights_problem()

    def solve(meta: Any) -> Any:
        state = problem.init(meta)
        for t in range(len(batches)):
            state = problem.step(state, meta, batches[t])
        return trees.detach(state)

    return bilevel.BlackBox(solve, problem.outer_loss)


ESTIMATORS = {name: estimator for row in ROWS.values() for name, estimator in row.workers.items()}
CARRIED = {name: estimator for row in ROWS.values() for name, estimator in row.streams.items()}
"""Estimators with a memory, which goes on from one window to the next."""


def windows(estimator: bilevel.Estimator) -> list[float]:
    """Return the numbers of three windows, and the memory at the end of the last."""
    problem, meta, batches = weights_problem()
    numbers: list[float] = []
    estimate = None
    for _ in range(3):
        estimate = estimator(problem, meta, batches, seed=3, carried=None if estimate is None else estimate.carried)
        meta = trees.map_leaves(lambda leaf: 0.9 * leaf, meta)
        numbers += [float(estimate.value), *torch.cat([g.reshape(-1) for g in trees.leaves(estimate.grad)]).tolist()]
        numbers.append(float(estimate.standard_error or 0.0))
    assert estimate is not None
    memory = trees.leaves(estimate.carried.memory)  # type: ignore[union-attr]
    return [*numbers, *torch.cat([torch.as_tensor(each).reshape(-1) for each in memory]).tolist()]


def estimates(folder: Path) -> None:
    """Every estimator; the first worker leaves numbers, all leave a checksum of them."""
    torch.set_default_dtype(torch.float64)
    problem, meta, batches = weights_problem()
    found: dict[str, Any] = {}
    workers = distributed.join_workers(timeout=PATIENT)
    with workers.sharing():
        for name, estimator in ESTIMATORS.items():
            box = name == "black box"
            estimate = estimator(black_box() if box else problem, meta, None if box else batches, seed=3)
            numbers = [float(estimate.value), *torch.cat([g.reshape(-1) for g in trees.leaves(estimate.grad)]).tolist()]
            found[name] = [*numbers, estimate.standard_error or 0.0]
        with bilevel.experimental.short_check(True):
            checked = bilevel.ForwardGradient(2)(problem, meta, batches, seed=3).diagnostics["checked"]
        found["checked"] = checked.rpartition("; at ")[0]
        found.update({name: windows(estimator) for name, estimator in CARRIED.items()})
    (folder / f"estimates-{workers.size}-{workers.rank}.json").write_text(json.dumps(found))


def curves(folder: Path) -> None:
    """Training with directions, and with exact estimates shared among workers."""
    torch.set_default_dtype(torch.float64)
    problem, meta, batches = weights_problem()
    found = {}
    for name, phase in {
        "directions": bilevel.Phase(bilevel.ForwardGradient(5, exchange="gradient"), 4, accumulate=2),
        "exact": bilevel.Phase(bilevel.Reverse(), 3, accumulate=5),
        "fewer than workers": bilevel.Phase(bilevel.Reverse(), 2, accumulate=2),
    }.items():
        fitted = bilevel.fit(problem, meta, batches, seed=1, phases=[phase], progress=False)
        rows = [[row["outer_loss"], row["grad_norm"], row["standard_error"]] for row in fitted.history]
        found[name] = [rows, fitted.meta["weights"].tolist()]
    workers = distributed.join_workers()
    for name in ("same directions", "fresh directions, chunks"):
        found[name] = streaming(CARRIED[name], folder / f"{name}-{workers.size}")
    found["backtracks"] = backtracking(workers.rank)
    (folder / f"curves-{workers.size}-{workers.rank}.json").write_text(json.dumps(found))


def streaming(estimator: bilevel.Estimator, out: Path) -> list[Any]:
    """Training on a stream; interrupted after the second outer step, and gone on from its checkpoint."""
    problem, meta, batches = weights_problem()

    def train(out: Path | None, callbacks: Sequence[Callable[[OuterStep], None]] = ()) -> list[Any]:
        fitted = bilevel.fit(
            problem, meta, batches, seed=1, phases=[bilevel.Phase(estimator, 4)], stream=True,
            out=None if out is None else bilevel.RunFolder(out, resume=True), callbacks=callbacks, progress=False,
        )  # fmt: skip
        rows = [[row["outer_loss"], row["grad_norm"], row["standard_error"]] for row in fitted.history]
        return [rows, fitted.meta["weights"].tolist()]

    with contextlib.suppress(InterruptedError, bilevel.errors.WorkerError):
        train(out, [stop_at_second])
    undisturbed = train(None)
    assert train(out) == undisturbed
    return undisturbed


def backtracking(rank: int) -> list[Any]:
    """Training that steps to where the first worker's solver fails, and the first worker's alone."""

    def solve(meta: Any) -> Tensor:
        if rank == 0 and bool((meta["weights"] > 1).any()):
            raise bilevel.errors.SolverError("beyond the cliff")
        return meta["weights"]

    fitted = bilevel.fit(
        bilevel.BlackBox(solve, lambda state, meta, batch: (state - 3).square().sum()),
        {"weights": torch.tensor([0.0, 0.1, 0.2])},
        phases=[bilevel.Phase(bilevel.ZerothOrder(3, distribution="coordinate"), 3)],
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.45),
        update=bilevel.OuterUpdate(max_backtracks=5),
        progress=False,
    )
    return [
        [[row["outer_loss"], row["grad_norm"], row["backtracks"]] for row in fitted.history],
        fitted.meta["weights"].tolist(),
    ]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Trouble(bilevel.GradientDescent):
    """Meets with something in one inner step of one worker at outer step 3."""

    def __init__(self, trouble: Callable[[], float], rank: int) -> None:
        self.trouble, self.rank, self.calls = trouble, rank, 0
        problem, _, _ = weights_problem()
        super().__init__(problem.inner_loss, problem._outer_loss, problem._make_params, problem.optimizer)

    def step(self, state: Any, meta: Any, batch: Any) -> Any:
        self.calls += 1
        after = super().step(state, meta, batch)
        if distributed.rank_in_environment() == self.rank and self.calls > 3 * 4:
            factor = self.trouble()
            after = after._replace(params=trees.map_leaves(lambda leaf: leaf * factor, after.params))
        return after


def troubled(
    folder: Path, trouble: Callable[[], float], rank: int = 1, timeout: float = PATIENT, every: int = 2
) -> None:
    """A run in which the directions of a worker meet with trouble at outer step 3."""
    torch.set_default_dtype(torch.float64)
    _, meta, batches = weights_problem()
    phase = bilevel.Phase(bilevel.ForwardGradient(2, chunk_size=1, exchange="slopes"), 6)
    workers = distributed.join_workers(timeout)
    bilevel.fit(
        Trouble(trouble, rank), meta, batches, phases=[phase], workers=workers, progress=False,
        out=bilevel.RunFolder(folder, checkpoint_every=every),
    )  # fmt: skip


def raises() -> float:
    raise ZeroDivisionError("the third example is not there")


def sleeps_until(is_over: Callable[[], bool]) -> Callable[[], float]:
    """Sleeps once, for as long as it takes."""
    left = [is_over]

    def sleep() -> float:
        while left:
            time.sleep(0.01)
            if left[0]():
                left.clear()
        return 1.0

    return sleep


def has_ended(log: Path) -> Callable[[], bool]:
    """Whether a worker has printed the error that ends it."""
    return lambda: log.exists() and log.stat().st_size > 0


def sleeps(seconds: float) -> Callable[[], float]:
    """Sleeps once."""
    left = [seconds]

    def sleep() -> float:
        time.sleep(left.pop() if left else 0)
        return 1.0

    return sleep


def other_seed_on_each(folder: Path) -> None:
    problem, meta, batches = weights_problem()
    seed, phases = distributed.rank_in_environment(), [bilevel.Phase(bilevel.Reverse(), 1)]
    bilevel.fit(problem, meta, batches, seed=seed, phases=phases, out=folder, progress=False)


def other_start_on_each(folder: Path) -> None:
    problem, meta, batches = weights_problem()
    meta["bias"] = meta["bias"] + distributed.rank_in_environment()
    bilevel.fit(problem, meta, batches, phases=[bilevel.Phase(bilevel.Reverse(), 1)], out=folder, progress=False)


def drifts_apart(folder: Path) -> None:
    """The outer loss of exact estimates differs between the workers by rounding."""
    problem, meta, batches = weights_problem()
    outer, factor = problem._outer_loss, 1 + 1e-6 * distributed.rank_in_environment()
    problem._outer_loss = lambda *arguments: outer(*arguments) * factor
    bilevel.fit(problem, meta, batches, phases=[bilevel.Phase(bilevel.Reverse(), 1)], out=folder, progress=False)


def lost_step() -> None:
    """The workers make different calls."""
    workers = distributed.join_workers(timeout=20)
    workers.together("apples" if workers.first else "pears", lambda: None)


def full_disk(folder: Path, every: int) -> None:
    """The first worker may write no file longer than a few lines of metrics; both must hear of it."""
    if distributed.rank_in_environment() == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    troubled(folder, lambda: 1.0, every=every)


def sharded(folder: Path) -> None:
    """The parameters of a network lie in halves in two processes; all of them compute the same direction together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.join_workers(timeout=PATIENT)
    mesh = init_device_mesh("cpu", (2,))
    halves = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in two_layers().items()}
    found = {}
    for name, estimator, optimizer in SHARDED:
        estimate = estimator(layers_problem(halves, optimizer), torch.linspace(-1, 1, 12), bilevel.no_batches(4))
        local = [tuple(trees.local(leaf).shape) for leaf in trees.leaves(estimate.state.params)]
        found[name] = [estimate.grad.tolist(), local]
    (folder / f"sharded-{distributed.rank_in_environment()}.json").write_text(json.dumps(found))


_SGD = bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
SHARDED = [
    (
        "momentum",
        bilevel.ForwardGradient(3, tangents="difference"),
        bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    ),
    ("adam", bilevel.ForwardGradient(2, tangents="difference"), bilevel.optimizer(torch.optim.Adam, lr=0.05)),
    ("solves", bilevel.ZerothOrder(2, step_size=1e-4), bilevel.optimizer(torch.optim.SGD, lr=0.1)),
]


def two_layers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"first": (6, 4), "bias": (6,), "second": (2, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layers_problem(params: Mapping[str, Tensor], optimizer: Optimizer) -> bilevel.GradientDescent:
    """Weights of examples; each layer is gathered where it is used, and only there."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()

    def logits(params: Any) -> Tensor:
        hidden = (x @ trees.whole(params["first"]).T + trees.whole(params["bias"])).tanh()
        return hidden @ trees.whole(params["second"]).T

    return bilevel.GradientDescent(
        lambda params, meta, batch: (meta.sigmoid() * cross_entropy(logits(params), y, reduction="none")).mean(),
        lambda params, meta, batch: cross_entropy(logits(params), 1 - y),
        params,
        optimizer,
    )


def fully_sharded(folder: Path) -> None:
    """A module to which `fully_shard` was applied, in halves in two processes; and what is refused then."""
    torch.set_default_dtype(torch.float64)
    workers = distributed.join_workers(timeout=PATIENT)
    found: dict[str, Any] = {"refused": refusals(folder, workers)}
    for name, _, optimizer in SHARDED[:2]:
        model = in_shards(small_network(), [0, 2])
        own = [trees.local(p.detach()).clone() for p in model.parameters()]
        problem, meta = network_problem(model, optimizer), torch.linspace(-1, 1, 12)
        kept = [torch.ones_like(p) for p in model.parameters()]  # gradients of its owner
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            model(torch.ones(4))  # a call of his: the root stays whole then
        estimate = bilevel.ForwardGradient(3, tangents="difference")(problem, meta, bilevel.no_batches(4))
        local = [tuple(trees.local(leaf).shape) for leaf in trees.leaves(estimate.state)[:-1] if torch.is_tensor(leaf)]
        after = [trees.local(p.detach()) for p in model.parameters()]
        untouched = all(torch.equal(a, b) for a, b in zip(own, after, strict=True))
        untouched &= all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
        untouched &= all(bool(trees.whole((g == 1).all())) for g in kept)
        found[name] = [estimate.grad.tolist(), local, untouched]
        together = Workers.of(sharers=Workers())
        out = folder / f"fully sharded, {name}"
        with contextlib.suppress(InterruptedError, bilevel.errors.WorkerError):
            fit_network(problem, out, together, [stop_at_second])
        found[f"fit, {name}"] = fit_network(problem, out, together)
    (folder / f"fully-sharded-{workers.rank}.json").write_text(json.dumps(found))


def refusals(folder: Path, workers: Workers) -> dict[str, str]:
    """What is said of each thing that cannot be done."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    meta, batches, solves = torch.linspace(-1, 1, 12), bilevel.no_batches(2), bilevel.ZerothOrder(1, step_size=1e-4)
    problem = network_problem(in_shards(small_network(), [0, 2]), _SGD)
    rates = bilevel.optimizer(torch.optim.SGD, lr=lambda meta: meta.mean().exp())
    learnt_rate = network_problem(in_shards(small_network(), [0, 2]), rates)
    by_layer = bilevel.GradientDescent(
        lambda model, meta, batch: model.by_layer(torch.ones(4)).sum() * meta.sum(),
        lambda model, meta, batch: model(torch.ones(4)).sum(),
        in_shards(ByLayer(torch.nn.Linear(4, 3), torch.nn.Tanh()), [0]),
        _SGD,
    )
    stream = partial(
        bilevel.fit, problem, meta, batches, phases=[bilevel.Phase(solves, 1)], stream=True, out=folder / "stream",
        workers=Workers.of(sharers=Workers()), progress=False,
    )  # fmt: skip
    spread = distribute_tensor(meta, init_device_mesh("cpu", (2,)), [Shard(0)])
    layers_alone = network_problem(in_shards(small_network(), [0], root=False), _SGD)
    return {
        "Reverse": message_of(lambda: bilevel.Reverse()(problem, meta, batches)),
        "Reverse, a rate": message_of(lambda: bilevel.Reverse()(learnt_rate, meta, batches)),
        "ForwardGradient": message_of(lambda: bilevel.ForwardGradient(2)(problem, meta, batches)),
        "Implicit": message_of(lambda: bilevel.Implicit()(problem, meta, batches)),
        "sharing": message_of(lambda: fit_network(problem, None, workers)),
        "layers alone": message_of(lambda: solves(layers_alone, meta, batches)),
        "stream": message_of(stream),
        "meta": message_of(lambda: solves(problem, spread, batches)),
        "meta in fit": message_of(lambda: bilevel.fit(problem, spread, batches, phases=[bilevel.Phase(solves, 1)])),
        "method": message_of(lambda: solves(by_layer, meta, batches)),
    }


def in_shards(
    model: torch.nn.Sequential, layers: Sequence[int], root: bool = True, mesh: Any = None
) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    for number in layers:
        fully_shard(model[number], mesh=mesh)
    if root:
        fully_shard(model, mesh=mesh)
    return model


def mesh_of_two_dimensions(folder: Path) -> None:
    """Two pairs of processes; each pair holds a model together, and the two share the directions."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_default_dtype(torch.float64)
    rank = distributed.join_workers(timeout=PATIENT).rank
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("directions", "shards"))
    problem = network_problem(in_shards(small_network(), [0, 2], mesh=mesh["shards"]), _SGD)
    workers = Workers.of(sharers=Workers.of(mesh.get_group("directions")))
    found = fit_network(problem, folder / "mesh", workers)
    (folder / f"mesh-{rank}.json").write_text(json.dumps(found))


class ByLayer(torch.nn.Sequential):
    """Has a way through its layers that is not `forward`."""

    def by_layer(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


def message_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def stop_at_second(step: OuterStep) -> None:
    if step.number == 2:
        raise InterruptedError


def small_network() -> torch.nn.Sequential:
    """Its shapes do not divide by two."""
    torch.manual_seed(3)
    second = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh())
    return torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), second, torch.nn.Linear(5, 2))


def network_problem(module: torch.nn.Module, optimizer: Optimizer) -> bilevel.GradientDescent:
    """Weights of examples and what is added to them; the inner loss calls the network twice."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()

    def inner_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            module(x[:1])  # past what it was given: a constant
        losses = cross_entropy(model(x + 0.1 * meta[:, None]), y, reduction="none")
        return (meta.sigmoid() * losses).mean() + 0.01 * model(x).square().mean()

    return bilevel.GradientDescent(
        inner_loss, lambda model, meta, batch: cross_entropy(model(x), 1 - y), module, optimizer
    )


def fit_network(
    problem: bilevel.GradientDescent,
    out: Path | None,
    workers: Workers,
    callbacks: Sequence[Any] = (),
) -> list[Any]:
    phases = [bilevel.Phase(bilevel.ForwardGradient(2, tangents="difference"), 3, accumulate=2)]
    fitted = bilevel.fit(
        problem, torch.linspace(-1, 1, 12), bilevel.no_batches(3), phases=phases,
        out=None if out is None else bilevel.RunFolder(out, resume=True),
        workers=workers, callbacks=callbacks, progress=False,
    )  # fmt: skip
    return [[row["outer_loss"] for row in fitted.history], fitted.meta.tolist()]


def command(folder: Path, *flags: str) -> None:
    """`bilevel run` as torchrun's workers run it."""
    small = ["--model", "mlp", "--width", "8", "--inner-steps", "2", "--outer-batch", "32", "--evaluation-runs", "1"]
    cli.main(["run", "condensation", *small, "--whole-set-epochs", "1", "--out", str(folder), *flags])


# -- all of it ---------------------------------------------------------------------------------------------------------


def main(base: Path, part: str = "") -> None:
    torch.set_num_threads(1)
    happened: dict[str, Any] = {}
    start = time.monotonic()

    def group(name: str, function: Callable[[], Any], size: int = 2, restarts: int = 0, alone: bool = False) -> None:
        """Run a group, and note its exit codes, what it printed, and how long it took."""
        began = time.monotonic()
        pids = fork_group(size, function, restarts, base / f"{name}.log")
        ended = []
        if alone:  # nobody stops the others, so that they have to find out for themselves
            codes = []
            for pid in pids:
                codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                ended.append(time.monotonic() - began)
        else:
            codes = wait_for_group(pids)
        printed = [(base / f"{name}.log.{rank}").read_text() for rank in range(size)]
        happened[name] = {"codes": codes, "printed": printed, "ended": ended}
        print(f"{time.monotonic() - start:.1f} s: {name}", flush=True)

    def terminated(name: str, function: Callable[[], Any], folder: Path, rank: int) -> None:
        pids = fork_group(2, function, 0, base / f"{name}.log")
        while not metrics.exist(folder):
            time.sleep(0.01)
        os.kill(pids[rank], signal.SIGTERM)
        printed_at = [base / f"{name}.log.{rank}" for rank in range(2)]
        happened[name] = {"codes": wait_for_group(pids), "printed": [path.read_text() for path in printed_at]}

    def alone_with_networks() -> None:
        torch.set_default_dtype(torch.float64)
        for name, _, optimizer in SHARDED[:2]:
            problem = network_problem(small_network(), optimizer)
            estimate = bilevel.ForwardGradient(3, tangents="difference")(
                problem, torch.linspace(-1, 1, 12), bilevel.no_batches(4)
            )
            happened[f"one process, {name}"] = estimate.grad.tolist()
            happened[f"one process, fit, {name}"] = fit_network(problem, None, Workers())

    if part == "fully-sharded":
        alone_with_networks()
        group("fully sharded", lambda: fully_sharded(base))
        torch.set_default_dtype(torch.float32)
        example = Path(__file__).parent.parent / "examples" / "sharded.py"
        group("example", lambda: runpy.run_path(str(example), run_name="__main__"))
        (base / "happened.json").write_text(json.dumps(happened))
        return
    estimates(base)  # this process alone; what torch sets up once, the forks have from here
    curves(base)
    train(base / "trained")
    for size in SIZES[1:]:
        group(f"estimates-{size}", lambda: estimates(base), size)
        group(f"curves-{size}", lambda: curves(base), size)
    group("undisturbed", lambda: troubled(base / "undisturbed", lambda: 1.0))
    group("nan", lambda: troubled(base / "nan", lambda: float("nan")), alone=True)
    group("nan, restarted", lambda: troubled(base / "nan", lambda: 1.0), restarts=1)
    group("error", lambda: troubled(base / "error", raises), alone=True)
    group("error of the first", lambda: troubled(base / "error of the first", raises, rank=0), alone=True)
    group("slow", lambda: troubled(base / "slow", sleeps(1.0)))
    group(
        "hangs",
        lambda: troubled(base / "hangs", sleeps_until(has_ended(base / "hangs.log.0")), timeout=HUNG),
        alone=True,
    )
    group("dies", lambda: troubled(base / "dies", lambda: os.kill(os.getpid(), signal.SIGKILL) or 1.0), alone=True)
    group("full disk", lambda: full_disk(base / "full disk", every=2), alone=True)
    group("full metrics", lambda: full_disk(base / "full metrics", every=100), alone=True)
    group("full disk, restarted", lambda: troubled(base / "full disk", lambda: 1.0), restarts=1)
    group("seeds", lambda: other_seed_on_each(base / "seeds"), alone=True)
    group("starts", lambda: other_start_on_each(base / "starts"), alone=True)
    group("drift", lambda: drifts_apart(base / "drift"), alone=True)
    group("lost step", lost_step, alone=True)
    terminated("terminated", lambda: train(base / "terminated", 0.05), base / "terminated", 0)
    group("terminated, restarted", lambda: train(base / "terminated"), size=3, restarts=1)
    for name, estimator, optimizer in SHARDED:
        alone = estimator(layers_problem(two_layers(), optimizer), torch.linspace(-1, 1, 12), bilevel.no_batches(4))
        happened[f"whole, {name}"] = alone.grad.tolist()
    group("sharded", lambda: sharded(base))
    alone_with_networks()
    group("mesh", lambda: mesh_of_two_dimensions(base), size=4)
    torch.set_default_dtype(torch.float32)
    flags = ("--estimator", "forward-gradient", "--directions", "4", "--outer-steps", "3")
    group("command", lambda: command(base / "command", *flags))
    group("command again", lambda: command(base / "command", *flags), alone=True)
    for_ever = ("--outer-steps", "100000", "--checkpoint-every", "1000")
    terminated("command terminated", lambda: command(base / "for ever", *for_ever), base / "for ever", 0)
    group("wrong flag", lambda: command(base / "command", "--directions", "many"), alone=True)
    (base / "happened.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
