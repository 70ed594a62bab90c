"""Tensors on two devices are refused; `torch.device("meta")` stands in for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from bad_input_cases import Row, call, descent, quadratic, refused, table, total
from torch import Tensor, nn

import bilevel


def elsewhere(*shape: int) -> Tensor:
    return torch.ones(*shape, device="meta")


def uses_batch(theta: Any, phi: Any, batch: Any) -> Tensor:
    return (quadratic(theta, phi, batch) * batch["x"]).sum()


DEVICES = [
    Row(
        "params elsewhere",
        lambda name: call(name, descent(params=elsewhere(2))),
        ValueError,
        ["params is on the meta device", "make it on cpu or a GPU"],
    ),
    Row(
        "a module elsewhere",
        lambda name: call(
            name, descent(lambda net, phi, batch: (net(phi) - phi).sum(), params=nn.Linear(2, 2).to("meta"))
        ),
        ValueError,
        ["parameter 'weight' of params is on the meta device", "to_empty(device='cpu')"],
    ),
    Row(
        "an inner batch elsewhere",
        lambda name: call(name, descent(uses_batch), inner_batches=[{"x": elsewhere(2)}] * 3),
        ValueError,
        ["meta is on cpu", "inner_batch['x'] is on meta", ".to("],
    ),
    Row(
        "the outer batch elsewhere",
        lambda name: call(name, outer_batch=(torch.ones(2), elsewhere(2))),
        ValueError,
        ["meta is on cpu", "outer_batch[1] is on meta", ".to("],
    ),
    Row(
        "meta on two devices",
        lambda name: call(name, meta={"a": torch.ones(2), "b": elsewhere(2)}),
        ValueError,
        ["2 devices", "meta['a'] is on cpu", "meta['b'] is on meta"],
    ),
]


@table(DEVICES)
def test_two_devices(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))


def test_two_devices_of_a_black_box() -> None:
    box = bilevel.BlackBox(lambda phi: phi, total)
    fragments = ["meta is on cpu", "outer_batch is on meta"]
    refused(ValueError, *fragments, by=lambda: call("zeroth-order", box, inner_batches=None, outer_batch=elsewhere(2)))
