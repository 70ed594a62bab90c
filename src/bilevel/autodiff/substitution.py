"""The rules under which a user's loss or step is run while it is differentiated.

A loss is run unchanged, under a `TorchFunctionMode` that looks up every operation in one table. Most operations are not
in the table. For the others the table has a composite form, or says that forward mode does not differentiate the
operation as reverse mode does. The cost is one Python call for each operation of the loss.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.eager_transforms import _autograd_grad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bilevel import randomness
from bilevel.autodiff import composites, custom_functions, refused_operations
from bilevel.autodiff.missing import FORWARD_MODE
from bilevel.errors import MissingDerivativeError

Result = TypeVar("Result")
Rule = Callable[["_Rules", Any, tuple[Any, ...], dict[str, Any]], Any]


class ReverseNeeded(MissingDerivativeError):  # noqa: N818
    """Raised if a derivative exists in reverse mode only. Another route than forward mode is then taken."""


@dataclass
class Memory:
    """Properties of the operations of one problem that were found at an earlier computation."""

    composite_normalisations: bool = False
    """Whether the loss contains a normalisation and also takes a gradient itself, so that third derivatives occur."""
    without_forward_mode: dict[str, str] = field(default_factory=dict)
    """The parts of the problem (a step, the outer loss) for which forward mode fails, and the reason for each."""
    one_by_one: bool = False
    """Whether backward passes through the problem cannot be batched by `torch.vmap`."""


_MEMORIES: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()


def memory_of(problem: Any) -> Memory:
    """Return the known properties of the operations of a problem."""
    try:
        return _MEMORIES.setdefault(problem, Memory())
    except TypeError:  # the problem's functions cannot be hashed
        return Memory()


class _State(threading.local):
    active: _Rules | None = None
    own_gradient: bool = False
    differentiated_loss: bool = False
    """Whether a loss runs whose gradient the library takes, so that a gradient inside it is differentiated at once."""


_STATE = _State()


class _Retry(BaseException):
    """Ends a run of user code that has to be started again with other rules. User code must not catch it."""


class _CompositesNeeded(_Retry):
    """Raised if the loss contains a normalisation and also takes a gradient itself."""


class _Unverified(_Retry):
    """Raised if the code uses a custom function whose derivatives have not been verified."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function


def run_user_code(
    call: Callable[[], Result],
    memory: Memory | None = None,
    forward_mode: bool = False,
    plainly: Callable[[], Any] | None = None,
    history: Sequence[Tensor] = (),
) -> Result:
    """Return `call()`, in which operations with a missing or wrong derivative are replaced.

    Args:
        call: runs the user's code. It may be run again, from the same random state.
        memory: the known properties of the operations of the problem, which are updated in place.
        forward_mode: whether the call is differentiated in forward mode.
        plainly: runs the same code without function transforms, for the verification of custom functions.
        history: arguments of the code that may have been computed from other tensors before.

    Raises:
        ReverseNeeded: the code contains an operation that forward mode does not differentiate as reverse mode does.
        MissingDerivativeError: an operation has no derivative.
    """
    before, memory = _STATE.active, Memory() if memory is None else memory
    if before is not None and (before.forward_mode or not forward_mode):
        return call()
    random = randomness.generator_states()
    for attempt in range(100):
        _STATE.active = _Rules(memory, forward_mode, history)
        try:
            if attempt:
                randomness.restore(random)
            with _STATE.active, _uncompiled():
                return call()
        except _CompositesNeeded:
            memory.composite_normalisations = True
        except _Unverified as unverified:
            _STATE.active = None
            with randomness.replayed(random), torch.enable_grad():
                custom_functions.verify(unverified.function, plainly or call)
        finally:
            _STATE.active = before
    raise AssertionError("user code asks for other rules every time")


def _uncompiled() -> AbstractContextManager[Any]:
    """Context manager in which models wrapped by `torch.compile` run without compilation.

    Compiled code has first derivatives only.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class own_gradient:  # noqa: N801
    """Context manager for gradients that the library takes, which do not count as gradients in the user's code."""

    def __enter__(self) -> None:
        self._before, _STATE.own_gradient = _STATE.own_gradient, True

    def __exit__(self, *error: object) -> None:
        _STATE.own_gradient = self._before


class loss_code:  # noqa: N801
    """Context manager for a user's loss of which the library takes the gradient."""

    def __enter__(self) -> None:
        self._before = _STATE.own_gradient, _STATE.differentiated_loss
        _STATE.own_gradient, _STATE.differentiated_loss = False, True

    def __exit__(self, *error: object) -> None:
        _STATE.own_gradient, _STATE.differentiated_loss = self._before


class _Rules(TorchFunctionMode):
    def __init__(self, memory: Memory, forward_mode: bool, history: Sequence[Tensor]) -> None:
        super().__init__()
        self.forward_mode = forward_mode
        self.history = history
        self.normalised = False
        self.twice_wrong: str | None = None
        """The name of an operation in this run whose second derivative is wrong in PyTorch."""
        self._table = _TABLES[forward_mode, memory.composite_normalisations]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = self._table.get(func)
        if rule is not None:
            return rule(self, func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


# -- rules -------------------------------------------------------------------------------------------------------------


def _composite(operation: composites.Operation) -> Rule:
    return lambda rules, func, args, kwargs: operation(*args, **kwargs)


def _checked(check: refused_operations.Check) -> Rule:
    def rule(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check(_name(func), args, kwargs)
        return func(*args, **kwargs)

    return rule


def _note_normalisation(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rules.normalised = True
    return func(*args, **kwargs)


def _note_twice_wrong(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replace an operation, and note that a plain loop that takes a gradient of its own would be wrong."""
    if func is not functional.linear_cross_entropy or kwargs.get("options") is not None:
        rules.twice_wrong = _name(func)
    return composites.SECOND_DERIVATIVE[func](*args, **kwargs)


def _note_layer_norm(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note a layer norm, or compute it in composite form if it has a bias and no weight.

    PyTorch's own backward pass of that combination cannot be differentiated.
    """
    weight, bias = (kwargs.get(name, (*args, None, None, None)[i]) for i, name in ((2, "weight"), (3, "bias")))
    if weight is None and bias is not None:
        return composites.THIRD_DERIVATIVE[func](*args, **kwargs)
    return _note_normalisation(rules, func, args, kwargs)


def _switch_both_modes(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Switch both modes of differentiation. PyTorch's `torch.no_grad()` switches off reverse mode only."""
    result = func(*args, **kwargs)
    torch._C._set_fwd_grad_enabled(args[0])  # pyright: ignore[reportAttributeAccessIssue]
    return result


def _detach(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make `.data` a constant in forward mode too, where PyTorch keeps its tangent."""
    return args[0].detach()


def _gradient_inside(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Handle `torch.autograd.grad` and `backward` in the user's code.

    In forward mode they would see only one level of the function transforms, and their results would not be constants.
    """
    if _STATE.own_gradient:
        return func(*args, **kwargs)
    by_functorch = _called_by(_autograd_grad.__code__)
    if rules.forward_mode and not by_functorch:
        raise ReverseNeeded(
            f"a loss or step takes a gradient of its own ({_name(func)}), {FORWARD_MODE}, or write torch.func.grad"
        )
    if rules.twice_wrong is not None and _STATE.differentiated_loss:
        raise MissingDerivativeError(
            f"a loss takes a gradient of its own and contains {rules.twice_wrong!r}, whose second derivative is wrong "
            f"in torch {torch.__version__}, so the inner gradient itself would be wrong; write that operation in terms "
            "of others (for linear_cross_entropy: options=None)"
        )
    if rules.normalised:
        raise _CompositesNeeded
    if not by_functorch and func is torch.autograd.grad:
        outputs = kwargs.get("outputs", args[0] if args else ())
        inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
        _require_no_history(rules.history, inputs)
        for function in custom_functions.between(outputs, inputs):
            custom_functions.require_two_derivatives(function)
            if not custom_functions.is_verified(function):
                raise _Unverified(function)
    return func(*args, **kwargs)


def _require_no_history(history: Sequence[Tensor], inputs: Any) -> None:
    """Raise if a gradient inside a loss would also reach its inputs through earlier steps.

    In a plain loop the parameters of a step are leaves. In one graph of all steps they are not leaves. The gradient
    with respect to an input of every step, such as φ, would then include a part through the parameters.

    Raises:
        MissingDerivativeError: an input is also reached through earlier steps.
    """
    leaves = {id(t) for t in ([inputs] if isinstance(inputs, Tensor) else inputs) if t.is_leaf}
    if not (leaves and history):
        return
    # A parameter that is a leaf was passed to the step as a view. Its own leaf is not an earlier step.
    nodes = [n for t in history if t.grad_fn is not None for n, _ in t.grad_fn.next_functions]
    nodes = [n for n in nodes if n is not None and not hasattr(n, "variable")]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in leaves:
            raise MissingDerivativeError(
                "a loss takes a gradient with respect to a tensor on which earlier inner steps depend too, and "
                'Reverse("graph") keeps the graph of all steps, so that gradient would reach through them; take '
                "Reverse()"
            )
        nodes += [n for n, _ in node.next_functions]


def _custom_function(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Handle the call of a custom function inside function transforms."""
    custom_functions.require_two_derivatives(args[0])
    if not custom_functions.is_verified(args[0]):
        raise _Unverified(args[0])
    return func(*args, **kwargs)


def _watched_hook(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Register a hook on a tensor inside a loss such that it may read the gradient and must not change it.

    A hook that changes the gradient would be called again in the second backward pass, on another gradient.

    Raises:
        ReverseNeeded: the loss is differentiated in forward mode.
    """
    tensor, hook = args[0], args[1] if len(args) > 1 else kwargs["hook"]
    if rules.forward_mode:
        raise ReverseNeeded(f"a loss registers a hook on a tensor, {FORWARD_MODE}")

    def watched(gradient: Tensor) -> None:
        if hook(gradient) is not None:
            raise MissingDerivativeError(
                f"the hook {_name(hook)!r}, registered on a tensor inside a loss, changes the gradient, and a second "
                "backward pass would call it again; take ForwardGradient(..., tangents='difference') or "
                "ZerothOrder(...), or leave the hook out"
            )

    return func(tensor, watched)


def _no_forward_mode(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise ReverseNeeded(
        f"the forward-mode derivative of {_name(func)!r} is wrong or missing in torch {torch.__version__}, "
        f"{FORWARD_MODE}"
    )


def _product_has_no_forward_mode(rules: _Rules, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if any(isinstance(a, str) and a == "prod" for a in (*args, *kwargs.values())):
        return _no_forward_mode(rules, func, args, kwargs)
    return func(*args, **kwargs)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _called_by(code: Any, depth: int = 12) -> bool:
    frame = sys._getframe(1)
    for _ in range(depth):
        if frame is None:
            return False
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


_EVERYWHERE: dict[Any, Rule] = {
    **{operation: _composite(composite) for operation, composite in composites.SECOND_DERIVATIVE.items()},
    **dict.fromkeys((torch.autograd.grad, torch.autograd.backward, Tensor.backward), _gradient_inside),
    custom_function_call: _custom_function,
    Tensor.register_hook: _watched_hook,
    **dict.fromkeys((torch._weight_norm, functional.linear_cross_entropy), _note_twice_wrong),  # pyright: ignore[reportPrivateImportUsage]
    **{operation: _checked(check) for operation, check in refused_operations.CHECKS.items()},
}
_IN_FORWARD_MODE: dict[Any, Rule] = {
    **{operation: _composite(composite) for operation, composite in composites.FORWARD_MODE.items()},
    torch._C._set_grad_enabled: _switch_both_modes,
    Tensor.data.__get__: _detach,  # pyright: ignore[reportAttributeAccessIssue]
    **dict.fromkeys((torch.triangular_solve, Tensor.triangular_solve, Tensor.detach_), _no_forward_mode),
    **dict.fromkeys(
        (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_), _product_has_no_forward_mode
    ),
}
_NORMALISATIONS = {
    False: {
        **dict.fromkeys(composites.THIRD_DERIVATIVE, _note_normalisation),
        **dict.fromkeys((functional.layer_norm, torch.layer_norm, torch.native_layer_norm), _note_layer_norm),
    },
    True: {operation: _composite(composite) for operation, composite in composites.THIRD_DERIVATIVE.items()},
}
_TABLES: Mapping[tuple[bool, bool], Mapping[Any, Rule]] = {
    (forward_mode, composite): {
        **_EVERYWHERE,
        **(_IN_FORWARD_MODE if forward_mode else {}),
        **_NORMALISATIONS[composite],
    }
    for forward_mode in (False, True)
    for composite in (False, True)
}
