"""One record of a measurement -> Markdown for people, JSON for programs.

Proof: tests/test_bench.py.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass
class Table:
    """Rows of cells under their names; a cell is a text or a number."""

    name: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)


@dataclass
class Record:
    """What was measured, on what, and what came out."""

    title: str
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)


def environment() -> dict[str, Any]:
    """What a figure depends on: machine, threads, versions, commit and command line."""
    import torch

    return {
        "command": " ".join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--short") else ""),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


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


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except OSError:
        return ""
    return run.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
