"""One record of a measurement -> Markdown and a picture for people, JSON for programs.

Proof: tests/test_bench.py.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.chart import Chart, png
from minigpt.files import write_atomically


@dataclass
class Table:
    """Rows of cells under their names; a cell is a text or a number."""

    name: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)


@dataclass
class Record:
    """What was measured, on what, and what came out; `passed` where there is something to pass."""

    title: str
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    passed: bool | None = None
    chart: Chart | None = None


def markdown(record: Record) -> str:
    """The record as a page: tables, notes, and the environment in small.

    >>> print(markdown(Record("Speed", [Table("", ["engine", "tokens/s"], [["a", 41.25]])])))
    ## Speed
    <BLANKLINE>
    | engine | tokens/s |
    |---|---|
    | a | 41.2 |
    <BLANKLINE>
    """
    lines = [f"## {record.title}", ""]
    for table in record.tables:
        if table.name:
            lines += [f"### {table.name}", ""]
        lines += [_row(table.columns), "|" + "---|" * len(table.columns)]
        lines += [*map(_row, table.rows), ""]
    for note in record.notes:
        lines += [note, ""]
    if record.environment:
        lines += [" · ".join(f"{k} {v}" for k, v in record.environment.items()), ""]
    return "\n".join(lines)


def write(record: Record, name: str, folder: Path) -> list[Path]:
    """Write `name`.md, `name`.json and, where there is a chart, `name`.png into a directory."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data, picture = (folder / f"{name}.{kind}" for kind in ("md", "json", "png"))
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(page, markdown(record).encode())
    write_atomically(data, (text + "\n").encode())
    if record.chart is None:
        return [page, data]
    write_atomically(picture, png(record.chart))
    return [page, data, picture]


def insert(record: Record, name: str, path: Path) -> None:
    """Put the page between the markers `<!-- name -->` and `<!-- /name -->` of a document."""
    before, after = around(name, path)
    write_atomically(path, f"{before}\n{markdown(record)}{after}".encode())


def around(name: str, path: Path) -> tuple[str, str]:
    """A document up to its first marker, and from its second; ValueError if it lacks them."""
    if not path.is_file():
        raise ValueError(f"no document {path}")
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{path} must hold {start} and {end}, between which the table goes")
    return before + start, end + after


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return (
            f"{cell:.3g}" if abs(cell) < 10 else f"{cell:.1f}" if abs(cell) < 100 else f"{cell:.0f}"
        )
    return str(cell)
