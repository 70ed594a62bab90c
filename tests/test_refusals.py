"""The page of refusals is what the source says at the moment."""

from __future__ import annotations

import runpy
from pathlib import Path

GENERATOR = Path(__file__).parent.parent / "docs" / "make_refusals.py"


def test_the_page_is_up_to_date() -> None:
    """If this fails, run `python docs/make_refusals.py`."""
    made = runpy.run_path(str(GENERATOR))
    assert made["PAGE"].read_text() == made["page"]()


def test_messages_are_collected_with_what_they_are_put_together_from() -> None:
    """A plain message, one behind a variable, one from a function, one inherited from a constant, and a warning."""
    found = runpy.run_path(str(GENERATOR))["refusals"]()
    texts = {(each.error, each.message) for each in found}

    def named(error: str, *fragments: str) -> bool:
        return any(e == error and all(f in text for f in fragments) for e, text in texts)

    assert named("ValueError", "inner_batches is empty")
    assert named("MissingDerivativeError", "has no forward-mode derivative in", "take Reverse() or ZerothOrder(...)")
    assert named("ReplayError", "gave another state when it was computed again")
    assert named("ValueError", "in place; states are kept", "state.clone()")
    assert named("Warning", "from outside of its arguments")
    assert not any("{" in text and "}" in text for _, text in texts if "f'" in text)
