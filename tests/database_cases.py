"""The entries of PyTorch's own test databases, as modules whose inputs are multiplied by learnable factors.

The databases need the package `expecttest`. Their import takes four seconds.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DOUBLE, EVERYTHING = torch.float64, slice(None)
Optimizer = tuple[type[torch.optim.Optimizer], Mapping[str, Any]]


def is_real(value: Any) -> bool:
    """Whether a value is a tensor of floating-point or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


LEFT_OUT = {
    **dict.fromkeys(
        ("normal", "normal.number_mean"),
        "PyTorch takes a normal sample for a constant, whatever its mean and deviation were computed from",
    ),
    **dict.fromkeys(
        ("float", "half", "bfloat16", "cfloat", "chalf"),
        "the result has less than double precision, so that differences of a loop are noise",
    ),
    "nn.functional.embedding": "PyTorch takes the padding row for a constant; the entry `nn.Embedding` has none",
    "Muon": "a part of the update is computed in bfloat16, so that differences of a loop are noise",
    "grid_sampler_2d": "the gradient jumps where a sampling point crosses a pixel, and some of the points lie there",
    **dict.fromkeys(("empty_like", "new_empty", "new_empty_strided"), "the values are whatever the memory holds"),
}
"""Entries without a truth that is known beforehand, and why."""
WITHOUT_PENALTY = {
    "_batch_norm_with_update": "an operation of torch.ops, which has no composite form; `F.batch_norm` has one",
}
"""Entries that are not taken with a gradient penalty, and why."""
FIRST_INPUT_ONLY = {
    "nn.HingeEmbeddingLoss": "the target is 1 or −1, and the loss jumps where it is neither",
    "nn.functional.hinge_embedding_loss": "the target is 1 or −1, and the loss jumps where it is neither",
}
"""Entries of which only the first input gets factors, and why."""


class Scaled(nn.Module):
    """f at inputs that are multiplied by learnable factors."""

    def __init__(self, call: Callable[..., Any], inputs: Any) -> None:
        super().__init__()
        self.call = call
        self._inputs, self._spec = pytree.tree_flatten(inputs)
        self.scales = nn.ParameterList()
        self.scale_inputs(len(self._inputs))
        self._counted: list[int] | None = None

    def scale_inputs(self, count: int) -> None:
        """Scale the first `count` floating-point inputs."""
        self._scaled = [i for i, t in enumerate(self._inputs) if is_real(t)][:count]
        self.scales = nn.ParameterList(
            nn.Parameter(torch.ones(self._inputs[i].shape, dtype=DOUBLE)) for i in self._scaled
        )

    def outputs(self, shift: Tensor) -> list[Tensor]:
        """The floating-point outputs."""
        inputs = [t.clone() if isinstance(t, Tensor) else t for t in self._inputs]
        for i, scale in zip(self._scaled, self.scales, strict=True):
            inputs[i] = inputs[i] * (scale * (1 + shift))
        args, kwargs = pytree.tree_unflatten(inputs, self._spec)
        return [t for t in pytree.tree_leaves(self.call(*args, **kwargs)) if is_real(t)]

    def count_outputs(self, shift: Tensor) -> int:
        """Leave out, from now on, the outputs that are constants for PyTorch, and return how many remain."""
        self._counted = [i for i, t in enumerate(self.outputs(shift)) if t.requires_grad]
        return len(self._counted)

    def forward(self, shift: Tensor) -> Tensor:
        """All floating-point outputs that have a derivative, in one vector."""
        found = self.outputs(shift)
        found = [found[i] for i in self._counted or range(len(found))]
        if any(t.layout != torch.strided for t in found):
            raise NotImplementedError("sparse outputs")
        parts = [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1).to(DOUBLE) for t in found]
        return torch.cat(parts) if parts else shift.new_zeros(0)


@dataclass(frozen=True)
class Case:
    """One input of one entry of a database."""

    database: str
    entry: str
    kind: str
    make: Callable[[], Scaled] = field(repr=False)
    optimizer: Optimizer | None = None
    penalty: bool = False
    """Whether the inner loss also has the squared slope of itself along the inputs, so that third derivatives occur."""

    def __str__(self) -> str:
        return f"{self.database}: {self.entry} [{self.kind}]{', gradient penalty' if self.penalty else ''}"


# -- the databases -----------------------------------------------------------------------------------------------------


def _imported(name: str) -> Any:
    """A module of PyTorch's tests. Its import freezes the flags of `torch.backends`, which is undone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = importlib.import_module(f"torch.testing._internal.{name}")
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return found


def operations(limit: int = 2, part: slice = EVERYTHING) -> Iterator[Case]:
    """`op_db`: at most `limit` kinds of inputs of each operation in a part of the list."""
    op_db = _imported("common_methods_invocations").op_db
    for op in op_db[part]:
        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
        if DOUBLE not in op.dtypes:
            continue
        torch.manual_seed(0)
        try:
            samples = list(op.sample_inputs("cpu", DOUBLE, requires_grad=False))
        except Exception as error:
            print(name, "has no samples:", error)
            continue
        for kind, sample in distinct(samples, limit):
            yield Case("op_db", name, kind, functools.partial(_operation, op, sample))


def _operation(op: Any, sample: Any) -> Scaled:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(op.gradcheck_wrapper, op.op) if op.gradcheck_wrapper else op.op
        return sample.output_process_fn_grad(function(x, *args, **kwargs))

    return Scaled(call, ((sample.input, *sample.args), dict(sample.kwargs)))


def distinct(samples: Sequence[Any], limit: int) -> Iterator[tuple[str, Any]]:
    """One sample of each kind, not empty ones: by the types of arguments and the settings."""
    seen: set[str] = set()
    for sample in samples:
        tensors = [t for t in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(t, Tensor)]
        if any(t.numel() == 0 or t.is_sparse or t.layout != torch.strided for t in tensors):
            continue
        if sum(t.numel() for t in tensors) > 3000:
            continue
        kind = described(sample)
        if kind not in seen:
            seen.add(kind)
            yield kind, sample
            if len(seen) == limit:
                return


def described(sample: Any) -> str:
    """The types of arguments and the settings of a sample."""

    def word(a: Any) -> str:
        if isinstance(a, Tensor):
            return f"{min(a.ndim, 3)}d{'' if is_real(a) else ' ' + str(a.dtype).removeprefix('torch.')}"
        if isinstance(a, (list, tuple)):
            return "[" + ", ".join(sorted({word(x) for x in a})) + "]"
        return str(a) if isinstance(a, (bool, str, type(None))) else type(a).__name__

    parts = [word(sample.input), *map(word, sample.args), *(f"{k}={word(v)}" for k, v in sorted(sample.kwargs.items()))]
    return ", ".join(parts)[:100]


def modules(limit: int = 3, part: slice = EVERYTHING) -> Iterator[Case]:
    """`module_db`: at most `limit` inputs of each module in a part of the list, in training and in evaluation."""
    module_db = _imported("common_modules").module_db
    for info in module_db[part]:
        if DOUBLE not in info.dtypes:
            continue
        for training in (True, False) if info.train_and_eval_differ else (True,):
            torch.manual_seed(0)
            inputs = info.module_inputs_func(info, device="cpu", dtype=DOUBLE, requires_grad=False, training=training)
            seen: set[str] = set()
            for number, each in enumerate(inputs):
                kind = each.desc or str(number)
                if each.forward_input is None or kind in seen:
                    continue
                seen.add(kind)
                mode = "" if not info.train_and_eval_differ else "train, " if training else "eval, "
                yield Case("module_db", info.name, mode + kind, functools.partial(_module, info, each, training))
                if len(seen) == limit:
                    break


class _Module(Scaled):
    def __init__(self, module: nn.Module, inputs: Any) -> None:
        super().__init__(lambda *a, **k: None, inputs)
        self.module = module
        del self.call

    def call(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        if isinstance(self.module, nn.CTCLoss):  # whose first derivative is that of normalised inputs
            args = args[0].log_softmax(-1), *args[1:]
        return self.module(*args, **kwargs)


def _module(info: Any, each: Any, training: bool) -> Scaled:
    torch.manual_seed(1)
    made = each.constructor_input
    module = info.module_cls(*made.args, **made.kwargs).to(DOUBLE).train(training)
    inputs = copy.deepcopy((tuple(each.forward_input.args), dict(each.forward_input.kwargs)))
    if info.is_lazy:
        with torch.no_grad():
            module(*inputs[0], **inputs[1])
    return _Module(module, inputs)


def optimizers(limit: int = 100, part: slice = EVERYTHING) -> Iterator[Case]:
    """`optim_db`: at most `limit` settings of each optimiser in a part of the list."""
    optim_db = _imported("common_optimizers").optim_db
    for info in optim_db[part]:
        for each in info.optim_inputs_func("cpu")[:limit]:
            yield Case("optim_db", info.optim_cls.__name__, each.desc, _linear, (info.optim_cls, dict(each.kwargs)))


def _linear() -> Scaled:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).to(DOUBLE)
    return _Module(net, ((torch.randn(5, 3, dtype=DOUBLE),), {}))
