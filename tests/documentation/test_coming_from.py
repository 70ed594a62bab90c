"""The loops of other libraries on the page for those who come from them, beside the loop of this library."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from site_pages import DOCS, blocks
from torch.nn.functional import mse_loss

import bilevel

PAGE = "coming_from.md"
_THERE = re.compile(r"^```\{\.python \.there\}\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def there(word: str) -> str:
    """Return the loop of another library that contains the word."""
    (found,) = [code for code in _THERE.findall((DOCS / PAGE).read_text(encoding="utf-8")) if word in code]
    return found


def here(word: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks of this library up to the first that contains the word."""
    for block in blocks(PAGE):
        exec(block.code, names)
        if word in block.code:
            return names
    raise AssertionError(word)


@pytest.mark.parametrize("library", ["higher", "torchopt"])
@pytest.mark.filterwarnings("ignore")
def test_a_loop_of_another_library_has_the_same_gradient(library: str) -> None:
    other = pytest.importorskip(library, reason=f"the package {library} is not installed")
    names = here("Reverse()(problem", {library: other, "copy": copy})
    exec(there(f"{library}."), names)
    torch.testing.assert_close(names["estimate"].grad, names["grad"], rtol=1e-4, atol=1e-6)


class _Learner:
    """What learn2learn's MAML does, in case that it is not installed: a clone that is adapted by plain SGD."""

    def __init__(self, tensors: dict[str, torch.Tensor], module: torch.nn.Module, lr: float) -> None:
        self._tensors, self._module, self._lr = tensors, module, lr

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self._module, self._tensors, (x,))

    def clone(self) -> _Learner:
        return _Learner(dict(self._module.named_parameters()), self._module, self._lr)

    def adapt(self, loss: torch.Tensor) -> None:
        slopes = torch.autograd.grad(loss, list(self._tensors.values()), create_graph=True)
        pairs = zip(self._tensors.items(), slopes, strict=True)
        self._tensors = {name: tensor - self._lr * slope for (name, tensor), slope in pairs}


def test_a_loop_over_clones_has_the_gradient_of_tasks() -> None:
    names = here("bilevel.Tasks", {})
    model, estimate = names["model"], names["estimate"]
    loop = there("learn2learn")
    try:
        import learn2learn  # pyright: ignore[reportMissingImports]
    except ImportError:
        loop = loop.replace("learn2learn.algorithms.MAML(model, lr=0.05)", "_Learner({}, model, 0.05).clone()")
        learn2learn = None
    with torch.no_grad():  # the outer step has moved the model, so it is estimated again
        for parameter in model.parameters():
            parameter.grad = None
    batch, outer = (names["inner_x"], names["inner_y"]), (names["outer_x"], names["outer_y"])
    estimate = bilevel.Reverse()(bilevel.Tasks(names["maml"], 4), model, [batch] * 3, outer)
    exec(loop, {**names, "learn2learn": learn2learn, "_Learner": _Learner, "mse_loss": mse_loss})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(estimate.grad[name], parameter.grad, rtol=1e-4, atol=1e-6)
