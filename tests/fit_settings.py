"""`fit` called with the fields of its settings side by side, for tests that vary one of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from bilevel import OuterUpdate, RunFolder


def grouped(settings: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `fit`: fields of `OuterUpdate` and `RunFolder` are moved into these.

    Fields of `RunFolder` have no effect if there is no folder `out`.
    """
    update, folder = ({f.name: settings[f.name] for f in fields(kind) if f.name in settings} for kind in KINDS)
    rest = {name: value for name, value in settings.items() if name not in update and name not in folder}
    if update:
        rest["update"] = OuterUpdate(**update)
    if rest.get("out") is not None:
        rest["out"] = RunFolder(rest["out"], **folder)
    return rest


KINDS = (OuterUpdate, RunFolder)
