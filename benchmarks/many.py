"""Many tasks and many outer losses at once, against the same thing written by hand with torch.func.

    python benchmarks/many.py

Three comparisons, each of equal numbers:

- K = 25 tasks of MAML on sinusoids (a 40-40 network, 5 inner steps): one hand-written `vmap` over the tasks with one
  backward pass, against `Tasks` in several estimators, and against 25 estimates one by one.
- m = 10 and 50 outer losses of one inner loop (an MLP with 50 steps of SGD and a weight for each example): one
  hand-written graph with batched cotangents, against vectors of outer losses, and against m estimates one by one.
- Training over sinusoids with `FirstOrder` and `Reverse("graph")`: the outer loss on new tasks after the same steps.

Medians of process time, one thread. Writes `benchmarks/results/many.md`.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import bilevel
from bilevel import FirstOrder, ForwardGradient, Reverse, Tasks
from bilevel.report.files import write_text

RESULTS = Path(__file__).parent / "results"
TASKS, INNER, RATE = 25, 5, 0.01
STEPS, EXAMPLES, WIDTH = 50, 64, 32


def measured(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of process time, the median; before several calls, one is not counted."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


# -- tasks -------------------------------------------------------------------------------------------------------------


def sinusoids(tasks: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Ten points to adapt to and ten to judge by, of sine waves with random amplitudes and phases."""
    generator = torch.Generator().manual_seed(seed)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = torch.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, 20, 1, generator=generator) - 5
    y = amplitude * (x - phase).sin()
    return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def maml(net: nn.Module, rate: float = RATE) -> bilevel.GradientDescent:
    def loss(model: Any, meta: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return bilevel.GradientDescent(loss, loss, net, bilevel.optimizer(torch.optim.SGD, lr=rate))


def tasks_by_hand(net: nn.Module, inner: Any, outer: Any) -> list[Tensor]:
    start = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(net, params, (x,)) - y).square().mean()

    def task(x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
        params = start
        for _ in range(INNER):
            slopes = grad(loss)(params, x, y)
            params = {name: p - RATE * slopes[name] for name, p in params.items()}
        return loss(params, new_x, new_y)

    return list(torch.autograd.grad(vmap(task)(*inner, *outer).mean(), list(start.values())))


def rows_of_tasks() -> list[str]:
    net = network()
    inner, outer = sinusoids(TASKS, seed=0)
    problem, batches = maml(net), bilevel.batches(lambda t: inner, INNER)
    tasks = Tasks(problem, TASKS)

    def one_by_one() -> Tensor:
        found = []
        for k in range(TASKS):
            own = tuple(t[k] for t in inner)
            each = Reverse("graph")(problem, net, bilevel.batches(lambda t, own=own: own, INNER), [t[k] for t in outer])
            found.append(torch.cat([g.reshape(-1) for g in each.grad.values()]))
        return torch.stack(found).mean(0)

    expected = torch.cat([g.reshape(-1) for g in tasks_by_hand(net, inner, outer)])
    together = Reverse("graph")(tasks, net, batches, outer).grad
    for found in (torch.cat([g.reshape(-1) for g in together.values()]), one_by_one()):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    hand = measured(lambda: tasks_by_hand(net, inner, outer), 9)
    timed = [("`vmap` by hand, one backward pass", hand)]
    for name, estimator in (
        ('`Reverse("graph")`, `Tasks`', Reverse("graph")),
        ("`Reverse()`, `Tasks`", Reverse()),
        ("`FirstOrder()`, `Tasks`", FirstOrder()),
        ("`ForwardGradient(4)`, `Tasks`", ForwardGradient(4)),
    ):
        timed.append((name, measured(lambda estimator=estimator: estimator(tasks, net, batches, outer), 9)))
    timed.append(('`Reverse("graph")`, one task after the other', measured(one_by_one, 1)))
    return [f"| {name} | {ms:.1f} | {ms / TASKS:.2f} | {ms / hand:.2f} |" for name, ms in timed]


# -- outer losses ------------------------------------------------------------------------------------------------------


def losses_by_hand(m: int) -> tuple[bilevel.GradientDescent, bilevel.GradientDescent, Tensor, Callable[[], Tensor]]:
    """A problem with m outer losses, the same with the loss numbered by its batch, meta, and the gradients by hand."""
    torch.manual_seed(0)
    x, y, queries = torch.randn(EXAMPLES, WIDTH), torch.randn(EXAMPLES, 1), torch.randn(m, WIDTH)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    meta = torch.zeros(EXAMPLES)

    def inner_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (meta.sigmoid() * (model(x) - y).square().squeeze(1)).mean()

    def outer_losses(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return model(queries if batch is None else queries[batch : batch + 1]).square().squeeze(1)

    def one_loss(model: Any, meta: Tensor, batch: int) -> Tensor:
        return outer_losses(model, meta, batch)[0]

    optimizer = bilevel.optimizer(torch.optim.SGD, lr=0.05)
    problem = bilevel.GradientDescent(inner_loss, outer_losses, net, optimizer)
    single = bilevel.GradientDescent(inner_loss, one_loss, net, optimizer)

    def by_hand() -> Tensor:
        phi = meta.clone().requires_grad_()
        params = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
        for _ in range(STEPS):
            loss = inner_loss(lambda z, params=params: functional_call(net, params, (z,)), phi, None)
            slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - 0.05 * s for (name, p), s in zip(params.items(), slopes, strict=True)}
        losses = outer_losses(lambda z: functional_call(net, params, (z,)), phi, None)
        return torch.autograd.grad(losses, phi, torch.eye(m), is_grads_batched=True)[0]

    return problem, single, meta, by_hand


def rows_of_losses(m: int) -> list[str]:
    problem, single, meta, by_hand = losses_by_hand(m)

    def one_by_one() -> Tensor:
        return torch.stack([Reverse("graph")(single, meta, STEPS, j).grad for j in range(m)])

    expected = by_hand()
    for found in (Reverse("graph")(problem, meta, STEPS).grad, Reverse("sqrt")(problem, meta, STEPS).grad):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    repeats = 3
    hand = measured(by_hand, repeats)
    timed = [("one graph by hand, batched cotangents", hand)]
    for name, estimator in (
        ('`Reverse("graph")`', Reverse("graph")),
        ("`Reverse()`", Reverse()),
        ('`Reverse("sqrt", chunk_size=10)`', Reverse("sqrt", chunk_size=10)),
    ):
        timed.append((name, measured(lambda estimator=estimator: estimator(problem, meta, STEPS), repeats)))
    timed.append(('`Reverse("graph")`, one loss after the other', measured(one_by_one, 1)))
    return [f"| {name} | {ms:.0f} | {ms / m:.1f} | {ms / hand:.2f} |" for name, ms in timed]


# -- training ----------------------------------------------------------------------------------------------------------


def rows_of_training(steps: int = 100) -> list[str]:
    rows = []
    inner, outer = sinusoids(200, seed=10**6)
    for name, estimator in (('`Reverse("graph")`', Reverse("graph")), ("`FirstOrder()`", FirstOrder())):
        net = network()
        start = time.process_time()
        bilevel.fit(
            Tasks(maml(net), TASKS),
            net,
            lambda n: bilevel.batches(lambda t: sinusoids(TASKS, n)[0], INNER),
            lambda n: sinusoids(TASKS, n)[1],
            estimator=estimator,
            steps=steps,
            optimizer=bilevel.optimizer(torch.optim.Adam, lr=1e-3),
            progress=False,
        )
        spent = time.process_time() - start
        after = Reverse("graph")(Tasks(maml(net), 200), net, bilevel.batches(lambda t: inner, INNER), outer).value
        rows.append(f"| {name} | {float(after):.2f} | {spent:.0f} |")
    before = network()
    value = Reverse("graph")(Tasks(maml(before), 200), before, bilevel.batches(lambda t: inner, INNER), outer).value
    return [f"| untrained | {float(value):.2f} | |", *rows]


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# Many tasks and many outer losses at once",
        "",
        f"`python benchmarks/many.py`: process time in milliseconds, medians, float32, one thread. bilevel "
        f"{bilevel.__version__}, torch {torch.__version__}, python {platform.python_version()}. Numbers agree with "
        "those by hand to rounding. The machine was busy, which changes times by some ten percent.",
        "",
        f"## K = {TASKS} tasks",
        "",
        f'MAML on sinusoids, a 40-40 network, {INNER} inner steps of SGD on 10 points. With `Reverse("graph")`, all '
        f"{TASKS} tasks together cost two to three single estimates, and about twice the code by hand.",
        "",
        "| | ms | ms for each task | by hand = 1 |",
        "| --- | --- | --- | --- |",
        *rows_of_tasks(),
    ]
    for m in (10, 50):
        lines += [
            "",
            f"## m = {m} outer losses",
            "",
            f"An MLP of three layers of {WIDTH}, {EXAMPLES} examples with a weight each, {STEPS} steps of SGD. A "
            "vector costs a small part of separate estimates. Against the graph by hand, what is left is the overhead "
            'of one estimate, the larger the fewer losses there are; `Reverse()` and `Reverse("sqrt")` hold one '
            "step's graph instead of all.",
            "",
            "| | ms | ms for each loss | by hand = 1 |",
            "| --- | --- | --- | --- |",
            *rows_of_losses(m),
        ]
    lines += [
        "",
        "## Training on sinusoids",
        "",
        f"The outer loss on 200 new tasks after 100 outer steps of Adam over {TASKS} tasks each. The seconds are "
        "process time.",
        "",
        "| estimator | outer loss | seconds |",
        "| --- | --- | --- |",
        *rows_of_training(),
        "",
    ]
    write_text(RESULTS / "many.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
