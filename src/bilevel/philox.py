"""Random signs and normal numbers by Philox4x32-10, made on the device where they are needed.

Philox is a function from a key of 64 bits and a counter of 128 bits to 128 random bits. It has no state, so any part of
a long random vector can be made by itself, in chunks, and on any device. It needs nothing but products, shifts and
bitwise operations of whole numbers, which give the same bits on every device.

The counter that belongs to entry j of a vector is (block, block >> 32, row, part), where `block` counts groups of
entries that share 128 bits: 128 signs or 4 normal numbers. `row` and `part` are numbers of the caller's.

Reference: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
"""The constants of Philox4x32, from Table 2 and Section 4.2 of the reference."""

LOW = 0xFFFFFFFF
CHUNK = 2**20
"""The number of entries whose bits are in memory together. On a CPU, larger chunks do not fit into its cache."""

Words = tuple[Any, Any, Any, Any]
"""Four words of 32 bits: whole numbers, or NumPy arrays or tensors of them of type int64."""


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Compute the 128 random bits that belong to a counter.

    Args:
        counter: four words. Arrays and tensors of words stand for as many counters; they are broadcast.
        key: two words.

    Returns:
        Four words of the type of the counter.

    >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(ROUNDS):
        # The product of two words has 64 bits. In int64 its upper bit is taken for a sign, which moves into the upper
        # half on the shift and is removed there. The upper halves of b and d have no effect before the last line.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((second >> 32) ^ b ^ k) & LOW, second, ((first >> 32) ^ d ^ l) & LOW, first
        k, l = (k + KEY_INCREMENTS[0]) & LOW, (l + KEY_INCREMENTS[1]) & LOW  # noqa: E741
    return a, b & LOW, c, d & LOW


def signs(
    key: int,
    rows: Sequence[int],
    start: int,
    stop: int,
    *,
    part: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return independent random signs, `[len(rows), stop - start]`: these entries of the vector of each row.

    The numbers are the same on every device. Besides the result, the memory of `CHUNK` entries is used.

    Args:
        key: a whole number of at most 64 bits.
        rows: the numbers of the vectors, each below 2³².
        start: the first entry.
        stop: the entry after the last one.
        part: distinguishes vectors of one row, below 2³².
        dtype: the type of the result.
        device: the device on which the numbers are made.

    >>> signs(7, [3], 0, 6).tolist()[0][2:] == signs(7, [2, 3], 2, 6).tolist()[1]
    True
    """
    return _in_chunks(_signs_of, 128, key, rows, part, start, stop, dtype, torch.device(device))


def normals(
    key: int,
    rows: Sequence[int],
    start: int,
    stop: int,
    *,
    part: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return independent standard normal numbers. The arguments are those of `signs`.

    They are computed in double precision by the method of Box and Muller, √(−2 log u) (cos 2πw, sin 2πw) from two words
    as uniform numbers u and w. Devices agree to the rounding errors of log, cos and sin. No number is above 6.8 in
    absolute value, since u ≥ 2⁻³³; normal numbers beyond that have probability 1e-11.
    """
    return _in_chunks(_normals_of, 4, key, rows, part, start, stop, dtype, torch.device(device))


def _in_chunks(
    entries_of: Callable[[tuple[Tensor, ...], torch.dtype], Tensor],
    width: int,
    key: int,
    rows: Sequence[int],
    part: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the entries that `entries_of` makes of random words, `width` of them of each block."""
    blocks = max(1, CHUNK // (width * max(1, len(rows))))
    first, last = start // width, -(-stop // width)

    def chunk(begin: int, end: int) -> Tensor:
        entries = entries_of(_words(key, rows, part, begin, end, device), dtype)
        return entries[:, max(start - begin * width, 0) : stop - begin * width]

    if last - first <= blocks:
        return chunk(first, last)
    result = torch.empty(len(rows), stop - start, dtype=dtype, device=device)
    for begin in range(first, last, blocks):
        entries = chunk(begin, min(begin + blocks, last))
        place = max(begin * width - start, 0)
        result[:, place : place + entries.shape[1]] = entries
    return result


def _words(key: int, rows: Sequence[int], part: int, begin: int, end: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the four random words of each block from `begin` to `end`, each `[len(rows), end - begin]`."""
    if device.type == "cpu":  # NumPy takes a third of the time of PyTorch for short vectors, and less for long ones too
        blocks, numbers = np.arange(begin, end, dtype=np.int64), np.asarray(rows, dtype=np.int64)
    else:
        blocks = torch.arange(begin, end, device=device)
        if isinstance(rows, range):  # copied from the host, the numbers would make it wait for the device
            numbers = torch.arange(rows.start, rows.stop, rows.step, device=device)
        else:
            numbers = torch.tensor(rows, dtype=torch.int64, device=device)
    words = philox4x32((blocks & LOW, blocks >> 32, numbers[:, None], part), (key & LOW, key >> 32))
    return words if device.type != "cpu" else tuple(map(torch.from_numpy, words))


def _signs_of(words: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    places = torch.arange(32, dtype=torch.int32, device=words[0].device)
    bits = (torch.stack(words, -1).to(torch.int32).unsqueeze(-1) >> places).bitwise_and_(1)
    return bits.to(dtype).mul_(2).sub_(1).reshape(len(words[0]), -1)


def _normals_of(words: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    found = []
    for uniform, turn in (words[:2], words[2:]):
        length = uniform.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = turn.double().mul_(2 * math.pi * 2.0**-32)
        found += [length * angle.cos(), length * angle.sin()]
    return torch.stack(found, -1).reshape(len(words[0]), -1).to(dtype)
