"""Beside step 14: what a run leaves on disk, and how it goes on after it was killed.

    log.jsonl         a line for each step and each evaluation
    checkpoint-N/     the trained weights, their moments, and where the run stands after N steps
    best/             the best model so far
    curves.png        the log as a picture

Since batches and dropout depend on a step's number only, nothing else has to be kept. Tensors are
in safetensors, the rest is JSON: no file can run code.

Twin: hf_bridge/runs.py.  Proof: tests/test_train.py.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from minigpt.files import read_json, save_tensors, write_atomically, write_json

Record = dict[str, Any]

LOG, CURVES, BEST = "log.jsonl", "curves.png", "best"
WEIGHTS, MOMENTS, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"


class Log:
    """The records of a run, in memory and, where there is a folder, in its log.jsonl too.

    It begins with the records up to step `step`: a run that goes on writes the rest anew.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self.records: list[Record] = []
        self._file = None
        if folder is not None:
            self.records = [line for line in _read_log(folder / LOG) if line["step"] <= step]
            write_atomically(folder / LOG, "".join(map(_line, self.records)).encode())
            self._file = open(folder / LOG, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: Record) -> None:
        """Add a record; it is on its way to the disk when this returns."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write `folder`/checkpoint-N, of the state's step, whole or not at all; drop older ones."""
    target = folder / f"checkpoint-{state['step']}"
    part = folder / f".{target.name}.part"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {
        f"{name}.{key}": value
        for name, p in trained.items()
        for key, value in optimizer.state[p].items()
    }
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_tensors({name: p.detach() for name, p in trained.items()}, part / WEIGHTS)
        save_tensors(moments, part / MOMENTS)
        write_json(part / STATE, state)
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def find_checkpoint(folder: Path | None) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(_checkpoints(folder)), None) if folder is not None else None


def check_folder(folder: Path | None, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run; ValueError if it is not as meant."""
    if folder is None:
        return None
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise ValueError(f"{file} is a file: give a directory to write")
    checkpoint = find_checkpoint(folder)
    if resume and checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint to resume from: begin anew")
    if checkpoint is not None and not resume:
        raise ValueError(f"{checkpoint} is there already: resume it, or give another directory")
    if checkpoint is None and (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model, which a run would replace: give another one")
    return checkpoint


@torch.no_grad()
def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Put weights and moments back, and return the state.

    Raises ValueError, and changes nothing, if the checkpoint is of a run with other settings, of
    another program, or damaged.
    """
    state = read_settings(path / STATE, path)
    compare(path, state["settings"], settings)
    try:
        weights, moments = load_file(path / WEIGHTS), load_file(path / MOMENTS)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): begin anew in another directory") from error
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.copy_(weights[name])
    for what, moment in moments.items():  # none of a parameter that has had no gradient yet
        name, _, key = what.rpartition(".")
        optimizer.state[trained[name]][key] = moment.to(trained[name].device)
    return state


def read_settings(path: Path, checkpoint: Path) -> Record:
    """What a run's file says of it; ValueError if the run with that checkpoint has no such file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {checkpoint} is of another program")
    return read_json(path)


def compare(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first three, if settings differ from those in a run's file."""
    there, here = _flat(there), _flat(json.loads(json.dumps(here)))
    wrong = [
        f"{name} is {there.get(name)} there, {here.get(name)} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        differ = f"{', '.join(wrong[:3])}{more}"
        raise ValueError(f"{path} is of another run: {differ}; give the same, or another directory")


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """The loss of the steps and of the evaluations, and the learning rate, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_loss" in record]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    few = len(steps) < 50
    loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.8, label="training")
    if evaluations:
        loss.plot(
            [r["step"] for r in evaluations],
            [r["eval_loss"] for r in evaluations],
            marker="o" if few or len(evaluations) < 50 else None,
            markersize=4,
            label="evaluation",
        )
    loss.set_ylabel("loss per token (nats)")
    loss.legend()
    rate.plot([r["step"] for r in steps], [r["learning_rate"] for r in steps], color="gray")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=120)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered)]


def _read_log(path: Path) -> list[Record]:
    """The records of a log; a last line that was cut off by the end of the process is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
