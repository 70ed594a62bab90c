"""Philox4x32-10: its published values, and numbers that are the same in any chunk and on any device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from other_device import DEVICE, OtherDevice

from bilevel import philox

ONES = 0xFFFFFFFF
PUBLISHED = [
    ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""The known answers of the authors' library Random123: counter, key, and words (the last are the digits of π)."""

FORMS: dict[str, Any] = {"int": int, "numpy": lambda word: np.array([word]), "torch": lambda word: torch.tensor([word])}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_the_published_answers(form: str, counter: Any, key: tuple[int, int], expected: str) -> None:
    found = philox.philox4x32(tuple(map(FORMS[form], counter)), key)
    assert " ".join(f"{word if form == 'int' else word.item():08x}" for word in found) == expected


def test_signs_are_the_bits_in_their_order() -> None:
    words = philox.philox4x32((2, 0, 5, 7), (0x89ABCDEF, 0x01234567))
    bits = [(word >> place) & 1 for word in words for place in range(32)]
    found = philox.signs(0x0123456789ABCDEF, [5], 2 * 128, 3 * 128, part=7)
    assert found.tolist() == [[2.0 * bit - 1 for bit in bits]]


def test_normal_numbers_are_those_of_box_and_muller() -> None:
    words = philox.philox4x32((1, 0, 0, 0), (9, 0))
    expected = []
    for u, w in (words[:2], words[2:]):
        length, angle = math.sqrt(-2 * math.log((u + 0.5) / 2**32)), 2 * math.pi * w / 2**32
        expected += [length * math.cos(angle), length * math.sin(angle)]
    assert philox.normals(9, [0], 4, 8, dtype=torch.float64)[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("draw", [philox.signs, philox.normals])
@pytest.mark.parametrize(("start", "stop"), [(0, 1000), (3, 997), (128, 256), (129, 130), (700, 700)])
def test_any_part_and_any_chunk_is_the_same(draw: Any, start: int, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(3, range(4), 0, 1000)
    assert torch.equal(draw(3, [2, 0], start, stop), whole[[2, 0], start:stop])
    for chunk in (1, 500, 1024):
        monkeypatch.setattr(philox, "CHUNK", chunk)
        assert torch.equal(draw(3, range(1, 4), start, stop), whole[1:, start:stop])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_signs_of_every_type(dtype: torch.dtype) -> None:
    found = philox.signs(3, range(2), 0, 300, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.complex64), philox.signs(3, range(2), 0, 300).to(torch.complex64))


@pytest.mark.parametrize("draw", [philox.signs, philox.normals])
def test_other_keys_rows_and_parts_give_other_numbers(draw: Any) -> None:
    places = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), ((1 << 63) + 5, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = torch.cat([draw(key, [row], 0, 128, part=part) for key, row, part in places])
    assert len(found.unique(dim=0)) == len(places)


def test_entries_beyond_two_to_the_39_use_the_second_word() -> None:
    """A block has 128 signs, so its number takes more than 32 bits there."""
    far = philox.signs(0, [0], 2**39, 2**39 + 128)
    assert not torch.equal(far, philox.signs(0, [0], 0, 128))
    words = philox.philox4x32((0, 1, 0, 0), (0, 0))
    assert far[0, :32].tolist() == [2.0 * ((words[0] >> place) & 1) - 1 for place in range(32)]


@pytest.mark.parametrize("rows", [range(1, 4), [3, 1, 1]])
def test_another_device_gives_the_same_and_nothing_passes_through_the_host(rows: Any) -> None:
    here = [draw(5, rows, 10, 5000) for draw in (philox.signs, philox.normals)]
    with OtherDevice() as other:
        there = [draw(5, rows, 10, 5000, device=DEVICE) for draw in (philox.signs, philox.normals)]
        assert [t.device for t in there] == [DEVICE, DEVICE]
        assert not other.syncs
        signs, normals = (t.cpu() for t in there)
    assert torch.equal(signs, here[0])
    torch.testing.assert_close(normals, here[1])


def test_memory_beside_the_result_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor but the result grows with the number of entries."""
    sizes: list[int] = []
    own = philox._words

    def watched(*arguments: Any) -> Any:
        words = own(*arguments)
        sizes.append(words[0].numel())
        return words

    monkeypatch.setattr(philox, "_words", watched)
    monkeypatch.setattr(philox, "CHUNK", 2**12)
    for draw, entries in ((philox.signs, 128), (philox.normals, 4)):
        sizes.clear()
        assert draw(0, range(3), 0, 50_000).shape == (3, 50_000)
        assert max(sizes) * entries <= 2**12
        assert sum(sizes) * entries >= 150_000


def test_signs_are_independent_between_rows_parts_and_neighbours() -> None:
    """Of n fair products of signs, the mean is within 5/√n of 0: 1 false alarm in 10⁶ for each number."""
    n = 2**16
    vectors = torch.cat([philox.signs(11, range(4), 0, n), philox.signs(11, range(2), 0, n, part=1)])
    vectors = torch.cat([vectors, vectors.roll(1, 1), vectors.roll(32, 1)])
    products = vectors @ vectors.T / n
    assert vectors.mean(1).abs().max() < 5 / n**0.5
    assert (products - torch.eye(len(vectors))).abs().max() < 5 / n**0.5


def test_normal_numbers_have_the_distribution_function_of_a_normal_number() -> None:
    """By Kolmogorov and Smirnov: √n times the largest distance is above 2.7 once in 10⁶."""
    n = 2**17
    found = philox.normals(11, [0], 0, n, dtype=torch.float64)[0].sort().values
    distance = (torch.special.ndtr(found) - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) * n**0.5 < 2.7
    assert found.abs().max() < 6.8
