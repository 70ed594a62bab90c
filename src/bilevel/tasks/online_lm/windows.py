"""The documents of one estimate: windows of a shuffled stream in which no document occurs twice."""

from __future__ import annotations

from bilevel import randomness


def window(draw: int, steps: int, available: int, seed: int) -> list[int]:
    """Return the indices of the `steps` documents of draw number `draw`, in order.

    Every pass through the documents is a new permutation, divided into whole windows. The remaining documents of a pass
    are skipped. Each window starts from the base model, so the hypergradient covers the whole window, and no derivative
    is lost at its border. (The released code continues from the state of the previous window and treats that state as a
    constant.)

    >>> window(0, 2, 5, seed=0), window(1, 2, 5, seed=0)
    ([4, 0], [1, 3])
    """
    if steps > available:
        raise ValueError(f"inner_steps={steps}, but there are {available} documents to train the weight model on")
    per_pass = available // steps
    order = randomness.generator(seed, randomness.LM_ORDER, draw // per_pass, steps).permutation(available)
    first = draw % per_pass * steps
    return [int(i) for i in order[first : first + steps]]
