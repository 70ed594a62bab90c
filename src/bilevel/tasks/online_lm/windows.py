"""Which documents one estimate learns: windows of a shuffled stream, cut so that none counts twice."""

from __future__ import annotations

from bilevel import randomness


def window(draw: int, steps: int, available: int, seed: int) -> list[int]:
    """The indices of the `steps` documents that draw number `draw` learns, in order.

    Every pass through the documents is a new permutation, cut into whole windows; what is left over at its end is
    skipped, and comes up in another pass. Each window starts from the base model, so the hypergradient's horizon is the
    window, and no derivative is lost at its border (the released code goes on from the state of the window before and
    treats it as a constant).

    >>> window(0, 2, 5, seed=0), window(1, 2, 5, seed=0)
    ([4, 0], [1, 3])
    """
    if steps > available:
        raise ValueError(f"inner_steps={steps}, but there are {available} documents to train the weight model on")
    per_pass = available // steps
    order = randomness.generator(seed, randomness.LM_ORDER, draw // per_pass, steps).permutation(available)
    first = draw % per_pass * steps
    return [int(i) for i in order[first : first + steps]]
