"""The same hypergradient by other libraries: what `benchmarks/peers.py` compares with.

Every function takes a `Subject` of `benchmarks/models.py` and T, and returns dh/dφ; functions whose names end with
`_losses` also take a vector of outer losses, and return a row for each. Each uses its library as its own documentation
does, on the losses as they are written, with the settings that are best for it:

- `higher`: `copy_initial_weights=False` and `track_higher_grads=True`, the default.
- TorchOpt: `MetaSGD` and `MetaAdam` with their defaults. `use_accelerated_op=True` is no faster here (0.119 s against
  0.113 s for 30 steps of the MLP), and its derivative differs by 14 % in float32.
- Betty: `unroll_steps=T`.
- Bergson: what its own command sets: Adam with `eps_root=1e-17`, and `inplace=True` forwards.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from models import Subject
from torch import Tensor, nn

import bilevel
from bilevel import autodiff
from bilevel.models.module_view import modules_in
from bilevel.unrolling.unroll import unroll

# pyright: reportMissingImports=false
# ruff: noqa: ARG002  (other libraries' methods take arguments that are not needed here)


def through_higher(subject: Subject, steps: int) -> Tensor:
    """`higher.innerloop_ctx`."""
    import higher

    meta = subject.meta.clone().requires_grad_()
    optimizer = subject.algorithm(subject.network.parameters(), **subject.settings)
    with higher.innerloop_ctx(subject.network, optimizer, copy_initial_weights=False) as (model, inner):
        for _ in range(steps):
            inner.step(subject.inner_loss(model, meta))
        return torch.autograd.grad(subject.outer_loss(model), meta)[0]


def through_torchopt(subject: Subject, steps: int) -> Tensor:
    """`torchopt.MetaAdam` or `MetaSGD`."""
    import torchopt

    kind = torchopt.MetaAdam if subject.algorithm is torch.optim.Adam else torchopt.MetaSGD
    meta = subject.meta.clone().requires_grad_()
    model = copy.deepcopy(subject.network)
    inner = kind(model, **subject.settings)
    for _ in range(steps):
        inner.step(subject.inner_loss(model, meta))
    return torch.autograd.grad(subject.outer_loss(model), meta)[0]


class _Meta(nn.Module):
    """The meta parameters as a module."""

    def __init__(self, meta: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(meta.clone())

    def forward(self) -> Tensor:
        return self.value


def through_betty(subject: Subject, steps: int) -> Tensor:
    """Betty's `IterativeProblem` with `unroll_steps=T`, and an upper problem that differentiates through it.

    As published (0.2.1) it fails at its start: `initialize` patches the optimiser twice (KeyError: 'params'). With
    that repaired by hand its step fails, for an attribute `_fp16` that nothing sets. So does `HigherIterativeProblem`.
    """
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem, IterativeProblem

    logging.disable(logging.INFO)
    found: list[Tensor] = []

    class Inner(IterativeProblem):
        def model(self, *args: Any, **kwargs: Any) -> Any:
            return self.fmodule(self.params, self.buffers, *args, **kwargs)

        def training_step(self, batch: Any) -> Tensor:
            return subject.inner_loss(self.model, self.outer())

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return subject.outer_loss(self.inner.model)

        def grad_callback(self) -> None:
            found.append(self.module.value.grad.detach().clone())

    network, meta = copy.deepcopy(subject.network), _Meta(subject.meta)
    data = [torch.zeros(1)]
    inner = Inner(
        name="inner",
        config=Config(unroll_steps=steps),
        module=network,
        optimizer=subject.algorithm(network.parameters(), **subject.settings),
        train_data_loader=data,
    )
    outer = Outer(
        name="outer",
        config=Config(first_order=False),
        module=meta,
        optimizer=torch.optim.SGD(meta.parameters(), lr=0.0),
        train_data_loader=data,
    )
    order = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    engine = Engine([outer, inner], EngineConfig(train_iters=steps, strategy="cpu"), order)
    engine.run()
    return found[0]


class _Weighted(nn.Module):
    """The network and its inner loss, as Bergson's trainer calls a model: with a batch, for a loss."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.network = copy.deepcopy(subject.network)
        self._inner_loss = subject.inner_loss

    def forward(self, meta: Tensor, input_ids: Tensor) -> Tensor:
        return self._inner_loss(self.network, meta)


class _Stream:
    """T times the same batch with φ in it, in the place of Bergson's stream of weighted examples."""

    def __init__(self, meta: Tensor, steps: int) -> None:
        self.weights = meta.clone()
        self.device = meta.device
        self._steps = steps

    @property
    def requires_grad(self) -> bool:
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, t: int) -> dict[str, Tensor]:
        return {"meta": self.weights, "input_ids": torch.zeros(1, 2, device=self.device)}


def through_bergson(subject: Subject, steps: int) -> Tensor:
    """Bergson's `Trainer.train` with √T checkpoints on disk, then its `backward` through the whole run."""
    return through_bergson_losses(subject, steps, lambda model: subject.outer_loss(model).unsqueeze(0))[0]


def through_bergson_losses(subject: Subject, steps: int, outer_losses: Callable[[Any], Tensor]) -> Tensor:
    """The same for m outer losses, with one `train` and a `backward` for each."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    if subject.algorithm is torch.optim.Adam:
        optimizer = torchopt.adam(**subject.settings, eps_root=1e-17, moment_requires_grad=True)
    else:
        optimizer = torchopt.sgd(**subject.settings, moment_requires_grad=True)
    stream = _Stream(subject.meta, steps)
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), tempfile.TemporaryDirectory() as folder:
        trainer, state = Trainer.initialize(_Weighted(subject), optimizer)
        state.detach_()
        state = trainer.train(state, stream, inplace=True, save_dir=folder, save_mode="sqrt")
        state.detach_()
        rows, last = [], state
        for number in range(len(outer_losses(subject.network))):
            state = copy.deepcopy(last)  # a backward pass leaves its own way in it
            state.requires_grad = True
            params = {name.removeprefix("network."): p for name, p in state.params.items()}
            loss = outer_losses(
                lambda *a, params=params, **k: torch.func.functional_call(
                    subject.network, params, a, k, tie_weights=False
                )
            )[number]
            tensors = state.differentiable_tensors()
            grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
            count = len(state.params)
            start = BackwardState(
                dict(zip(state.params, grads[:count], strict=True)), list(grads[count:]), torch.zeros_like(subject.meta)
            )
            found = trainer.backward(folder, stream, start, state, cleanup=False, inplace=True, save_mode="sqrt")
            rows.append(found.weight_grads.detach())
        return torch.stack(rows)


def through_torchopt_losses(subject: Subject, steps: int, outer_losses: Callable[[Any], Tensor]) -> Tensor:
    """TorchOpt's graph of all steps, once, with batched cotangents."""
    import torchopt

    kind = torchopt.MetaAdam if subject.algorithm is torch.optim.Adam else torchopt.MetaSGD
    meta = subject.meta.clone().requires_grad_()
    model = copy.deepcopy(subject.network)
    inner = kind(model, **subject.settings)
    for _ in range(steps):
        inner.step(subject.inner_loss(model, meta))
    losses = outer_losses(model)
    return torch.autograd.grad(losses, meta, torch.eye(len(losses)), is_grads_batched=True)[0]


def recipe(count: int, subject: Subject, steps: int) -> Tensor:
    """All directions in one vmap(jvp) of the whole unrolled loss, as in the code released with (FG)²U."""
    run = unroll(subject.problem(), subject.meta, bilevel.no_batches(steps), None, seed=0)

    def loss(meta: Tensor) -> Tensor:
        state = run.start()
        for t in range(steps):
            state = run.step(t, state, meta)
        return run.outer_loss(state, meta)

    vectors = [torch.ones(count, *subject.meta.shape)]
    with autodiff.differentiable_kernels(modules_in([run.start()])):
        pushed = autodiff.push_forward(loss, [subject.meta], [vectors])
    return torch.einsum("k,k...->...", pushed.tangents[0], vectors[0]) / count
