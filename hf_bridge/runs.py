"""Beside step 14: what a run leaves on disk, and what it compares before it goes on.

    log.jsonl         a line for each step and each evaluation
    settings.json     what must be equal for the run to go on
    checkpoint-N/     the Trainer's own, after N steps
    best/             the best model so far
    curves.png        the log as a picture

The Trainer's checkpoints hold the optimizer's state as a pickle (read back with weights_only=True).

Twin: minigpt/runs.py.  Proof: tests/test_train.py.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from hf_bridge.files import read_json, writing

LOG, SETTINGS, CURVES, BEST = "log.jsonl", "settings.json", "curves.png", "best"
Record = dict[str, Any]


def check_folder(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run; ValueError if it is not as meant."""
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise ValueError(f"{file} is a file: give a directory to write")
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume and found is None:
        raise ValueError(f"{folder} has no checkpoint to resume from: begin anew")
    if found is not None and not resume:
        raise ValueError(f"{found} is there already: resume it, or give another directory")
    if found is None and (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model, which a run would replace: give another one")
    return None if found is None else Path(found)


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings for `compare`."""
    path.write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")


def read_settings(path: Path, checkpoint: Path) -> Record:
    """What a run's file says of it; ValueError if the run with that checkpoint has no such file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {checkpoint} is of another program")
    return read_json(path)


def compare(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first three, if settings differ from those in a run's file."""
    here = json.loads(json.dumps(here, default=str))
    wrong = [
        f"{name} is {there.get(name)} there, {here.get(name)} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        differ = f"{', '.join(wrong[:3])}{more}"
        raise ValueError(f"{path} is of another run: {differ}; give the same, or another directory")


def check_whole(checkpoint: Path) -> None:
    """Raise ValueError if the Trainer's checkpoint has no state, or a file that was cut off."""
    read_settings(checkpoint / "trainer_state.json", checkpoint)
    try:
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass  # opening compares the file's length with what its header tells
        for file in checkpoint.glob("*.pt"):
            with ZipFile(file):
                pass
    except (SafetensorError, BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}): begin anew in another directory") from error


class Log:
    """The records of a run up to step `step`, and those that follow, in memory and in log.jsonl.

    Every process of several reads; one of them writes.
    """

    def __init__(self, folder: Path, step: int = 0, *, writes: bool = True):
        self.path, self.writes = folder / LOG, writes
        self.records = [record for record in _read(self.path) if record["step"] <= step]
        if writes:
            part = self.path.with_name(f".{LOG}.part")
            part.write_text("".join(map(_line, self.records)), encoding="utf-8")
            os.replace(part, self.path)

    def write(self, record: Record) -> None:
        """Add a record; it is on its way to the disk when this returns."""
        self.records.append(record)
        if self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """The loss of the steps and of the evaluations as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        lines = [record for record in records if name in record]
        if lines:
            axes.plot([r["step"] for r in lines], [r[name] for r in lines], label=label)
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(path.parent) as part:
        figure.savefig(part / path.name, dpi=120)


def _read(path: Path) -> list[Record]:
    """The records of a log; a last line that was cut off by the end of the process is left out."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
