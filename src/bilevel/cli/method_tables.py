"""Tables with a row for each estimator, whose names are never broken: they are there to be copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text


@dataclass(frozen=True)
class Field:
    """A column beside the names."""

    header: str
    justify: Literal["left", "right"] = "right"
    wraps: bool = False
    """Whether its cells may be broken between words, even if the table would fit without."""


@dataclass(frozen=True)
class Row:
    """A method's name and its cells, one for each field."""

    name: str
    cells: Sequence[str]
    bold: bool = False


def print_methods(console: Console, title: str, fields: Sequence[Field], rows: Sequence[Row]) -> None:
    """Print the table in the width of the terminal.

    Where names and cells do not fit beside each other, the rows are numbered, and the names follow below the table,
    each on a line of its own. Where the cells alone do not fit, each method's are listed below its name.
    """
    names = Field("estimator", "left")
    borders = 3 * (len(fields) + 1) + 1
    wide = _widths([names, *fields], [[row.name, *row.cells] for row in rows], console.width - borders)
    if wide is not None:
        table = Table(*_columns([names, *fields], wide), title=title, title_justify="left")
        for row in rows:
            table.add_row(Text(row.name), *row.cells, style="bold" if row.bold else None)
        console.print(table)
        return
    numbers = Field("")
    cells = [[str(number), *row.cells] for number, row in enumerate(rows, 1)]
    room = console.width - (len(fields) + 2)
    narrow = _widths([numbers, *fields], cells, room)
    if narrow is None:
        fields = [Field(field.header, field.justify, wraps=True) for field in fields]
        narrow = _widths([numbers, *fields], cells, room)
    if narrow is None:
        _print_listed(console, title, fields, rows)
        return
    columns = _columns([numbers, *fields], narrow)
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0))
    for row, shown in zip(rows, cells, strict=True):
        table.add_row(*shown, style="bold" if row.bold else None)
    console.print(table)
    for number, row in enumerate(rows, 1):
        console.print(Text(f"{number}  {row.name}", "bold" if row.bold else ""), soft_wrap=True)


def _print_listed(console: Console, title: str, fields: Sequence[Field], rows: Sequence[Row]) -> None:
    """Print the name of each method, and below it what the table would say."""
    console.print(Text(title, "italic"))
    for row in rows:
        console.print(Text(row.name, "bold" if row.bold else ""), soft_wrap=True)
        cells = ", ".join(f"{field.header} {cell}" for field, cell in zip(fields, row.cells, strict=True))
        console.print(Padding(Text(cells), (0, 0, 0, 4)))


def _widths(fields: Sequence[Field], rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """The width of each column; `None` if cells do not fit."""
    cells = [[row[i] for row in rows] for i in range(len(fields))]
    widths = [
        max(_longest(field.header.split()), _longest([w for c in column for w in (c.split() if field.wraps else [c])]))
        for field, column in zip(fields, cells, strict=True)
    ]
    spare = room - sum(widths)
    if spare < 0:
        return None
    for i in sorted(range(len(fields)), key=lambda i: not fields[i].wraps):
        wanted = max(len(fields[i].header), _longest(cells[i])) - widths[i]
        widths[i] += min(spare, wanted)
        spare -= min(spare, wanted)
    return widths


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)


def _columns(fields: Sequence[Field], widths: Sequence[int]) -> list[Column]:
    return [
        Column(field.header, justify=field.justify, width=width, overflow="fold")
        for field, width in zip(fields, widths, strict=True)
    ]
