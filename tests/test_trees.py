"""Trees of tensors: taken apart and put together again, whatever is in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from bilevel import trees
from bilevel.models.conversion import as_plain_tree, as_tree
from bilevel.models.module_view import ModuleView


class Pair(NamedTuple):
    left: Any
    right: Any


def view() -> ModuleView:
    return as_tree(nn.Linear(2, 3))


TREES: dict[str, Any] = {
    "a lone tensor": torch.ones(2),
    "a scalar": torch.tensor(1.5),
    "a dict, keys in any order": {"z": torch.ones(2), "a": torch.zeros(3)},
    "lists, tuples and named tuples": [(torch.ones(1), 2), Pair(torch.zeros(2), [torch.ones(3)])],
    "numbers, words and None between": {"w": torch.ones(2), "steps": 3, "name": "sgd", "nothing": None, "rate": 0.5},
    "whole numbers and booleans": [torch.ones(2), torch.tensor([1, 2]), torch.tensor(True)],
    "complex": [torch.ones(2) * 1j, torch.ones(2)],
    "an empty tensor": [torch.zeros(0, 3), torch.ones(1)],
    "nothing differentiable": [1, torch.tensor([2])],
    "nothing at all": {},
    "a module": {"net": view(), "scale": torch.ones(())},
    "the same tensor twice": [torch.ones(2)] * 2,
}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
class TestEveryTree:
    def test_split_and_rebuild_is_the_identity(self, tree: Any) -> None:
        parts = trees.split(tree)
        again = parts.rebuild(parts.differentiable)
        assert trees.flatten(again)[1] == trees.flatten(tree)[1]
        assert all(a is b for a, b in zip(trees.leaves(again), trees.leaves(tree), strict=True))

    def test_rebuild_replaces_what_is_differentiable_and_nothing_else(self, tree: Any) -> None:
        parts = trees.split(tree)
        again = trees.split(parts.rebuild([t + 1 for t in parts.differentiable]))
        for new, old in zip(again.differentiable, parts.differentiable, strict=True):
            assert same(new, old + 1)
        assert all(a is b for a, b in zip(again.other, parts.other, strict=True))

    def test_parts_are_all_leaves_in_order(self, tree: Any) -> None:
        parts = trees.split(tree)
        leaves = trees.leaves(tree)
        expected = [leaf for leaf in leaves if trees.is_differentiable(leaf)]
        assert all(a is b for a, b in zip(parts.differentiable, expected, strict=True))
        assert trees.size(tree) == sum(t.numel() for t in [*parts.differentiable, *parts.other])

    def test_detached_values_are_the_same(self, tree: Any) -> None:
        recording = trees.map_leaves(lambda t: t.requires_grad_() if trees.is_differentiable(t) else t, _copy(tree))
        detached = trees.detach(recording)
        assert not any(isinstance(t, torch.Tensor) and t.requires_grad for t in trees.leaves(detached))
        assert all(same(a, b) for a, b in zip(trees.leaves(detached), trees.leaves(tree), strict=True))

    def test_names_reach_their_leaves(self, tree: Any) -> None:
        for name, leaf in trees.named_leaves(as_plain_tree(tree), "tree"):
            assert eval(name, {"tree": as_plain_tree(tree)}) is leaf


def _copy(tree: Any) -> Any:
    return trees.map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def test_a_module_s_tree_shares_its_parameters_without_recording() -> None:
    net = nn.Linear(2, 3)
    weight = as_tree(net).named_tensors["weight"]
    assert weight.data_ptr() == net.weight.data_ptr()
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("leaf", "finite"),
    [(1.0, True), (float("nan"), False), (float("inf"), False), (-float("inf"), False)],
)
def test_all_finite_looks_at_every_float(leaf: float, finite: bool) -> None:
    tree = {"a": torch.ones(3), "b": [torch.tensor([1, 2]), torch.tensor([0.0, leaf])]}
    assert trees.all_finite(tree) is finite
    assert trees.all_finite([torch.tensor([1]), leaf, "NaN"])  # numbers and words are settings


def test_products_of_lists() -> None:
    left = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    right = [torch.tensor([4.0, 5.0]), torch.tensor(6.0)]
    assert trees.dot(left, right) == 4 + 10 + 18
    assert trees.squared_norm(left) == 1 + 4 + 9
    with pytest.raises(ValueError, match="shorter"):
        trees.dot(left, right[:1])
