"""Command line flags from typed configurations. Each field is a flag, and its docstring is the help text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_type_hints

from bilevel.estimators import names
from bilevel.planning import registry
from bilevel.solvers import LinearSolver


def parse(program: str, description: str, arguments: Sequence[str], **defaults: Any) -> list[Any]:
    """Return several dataclass instances with the changes that the arguments specify. All their fields are flags.

    `None` as a default means "not given", and is not shown as a value. A field's metadata may give the name of its
    value in the help text (`metavar`).
    """
    import tyro

    _refuse_repetitions(arguments)
    shown = {name: _with_annotations(type(default)) for name, default in defaults.items()}
    fields = [(name, kind, dataclasses.field(default=kind(**vars(defaults[name])))) for name, kind in shown.items()]
    everything = dataclasses.make_dataclass("Arguments", fields, frozen=True)
    parsed = tyro.cli(
        everything,
        prog=program,
        description=description,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
    return [type(default)(**vars(getattr(parsed, name))) for name, default in defaults.items()]


def flag(name: str) -> str:
    """Return the flag of a field.

    >>> flag("outer_steps")
    '--outer-steps'
    """
    return "--" + name.replace("_", "-")


def choice(name: str, options: Sequence[str], default: str, title: str, help_text: str) -> Any:
    """Return an instance of a dataclass with one field, whose value is one of several words."""
    import tyro

    kind = Annotated[Literal[tuple(options)], tyro.conf.arg(help=help_text)]
    made = dataclasses.make_dataclass(name, [(name, kind, dataclasses.field(default=default))], frozen=True)
    made.__doc__ = title
    return made()


def estimator_settings(taken: Any = None) -> Any:
    """Return an instance of a dataclass with the settings of all estimators, each `None` for "not given".

    It is made from the estimators' constructors and docstrings, so the settings of a new estimator are flags at once.
    Settings with the name of a field of `taken` are left out. They can still be given in the estimator's text.
    """
    import docstring_parser
    import tyro

    owners: dict[str, list[str]] = {}
    fields: dict[str, tuple[str, Any, Any]] = {}
    for name, kind in reversed(registry.by_name().items()):  # of several with one setting, the first describes it
        types = get_type_hints(kind)
        help_texts = {p.arg_name: p.description or "" for p in docstring_parser.parse(kind.__doc__ or "").params}
        for setting in names.settings_of(kind):
            owners[setting] = [name, *owners.get(setting, [])]
            value_type = next((t for t in (int, float) if types[setting] in (t, t | None)), str)
            help_text = f"Of {', '.join(owners[setting])}: {' '.join(help_texts.get(setting, '').split())}"
            default = _default_as_text(kind, setting)
            help_text += f" (default: {default})" if default else ""
            annotation = Annotated[value_type | None, tyro.conf.arg(help=help_text)]
            fields[setting] = (setting, annotation, dataclasses.field(default=None))
    in_order = dict.fromkeys(setting for kind in registry.ESTIMATORS for setting in names.settings_of(kind))
    for field in () if taken is None else dataclasses.fields(taken):
        in_order.pop(field.name, None)
    made = dataclasses.make_dataclass("EstimatorSettings", [fields[setting] for setting in in_order], frozen=True)
    made.__doc__ = "Settings of the estimators; one that none of the chosen estimators has is refused."
    return made()


def given(settings: Any) -> dict[str, Any]:
    """Return the settings that were given. Numbers are converted for settings that accept numbers or words."""
    found = {name: value for name, value in vars(settings).items() if value is not None}
    return {name: int(v) if isinstance(v, str) and v.isdecimal() else v for name, v in found.items()}


def _default_as_text(kind: type[Any], setting: str) -> str:
    default = names.default_of(kind, setting)
    if default is None or default is dataclasses.MISSING:
        return ""
    return names.describe(default) if isinstance(default, LinearSolver) else str(default)


def _with_annotations(kind: type[Any]) -> type[Any]:
    """Return a copy of the dataclass with annotations that say how to show values that are not given."""
    import tyro

    hints = get_type_hints(kind, include_extras=True)
    fields = []
    for field in dataclasses.fields(kind):
        hint = "" if field.default is None else None
        metavar = field.metadata.get("metavar")
        if hint is not None or metavar is not None:
            annotation = Annotated[hints[field.name], tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)]
            fields.append((field.name, annotation, dataclasses.field(default=field.default)))
    made = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)
    made.__doc__ = kind.__doc__
    return made


def _refuse_repetitions(arguments: Sequence[str]) -> None:
    """Raise a ValueError if a flag is given twice, because all but the last would be ignored."""
    seen: set[str] = set()
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag in seen:
            raise ValueError(f"{flag} is given twice; once is enough, with several values if it takes several")
        seen.add(flag)
