"""One record of a measurement -> Markdown for people, JSON for programs.

Proof: tests/test_bench.py.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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
    """Write `name`.md and `name`.json into a directory."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / f"{name}.md", folder / f"{name}.json"
    page.write_text(markdown(record), encoding="utf-8")
    data.write_text(json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n", "utf-8")
    return [page, data]


def insert(record: Record, path: Path) -> None:
    """Put the page between the markers `<!-- name -->` and `<!-- /name -->` of a document.

    The name is the title's first word in small letters. Raises ValueError without markers.
    """
    name = record.title.split()[0].lower()
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = path.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise ValueError(f"{path} must hold {start} and {end}, between which the table goes")
    before, rest = text.split(start, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{markdown(record)}{end}{after}", encoding="utf-8")


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.3g}"
    return str(cell)
