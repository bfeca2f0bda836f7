"""Beside step 14: what was asked for on the command line, checked before anything long begins.

    options.json      what a run was asked for; who resumes it must ask for the same

Twin: minigpt/options.py.  Proof: tests/test_options.py.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from hf_bridge.batches import split
from hf_bridge.corpus import find_files
from hf_bridge.optimize import TrainConfig
from hf_bridge.runs import check_folder, compare, read_settings, write_settings

OPTIONS = "options.json"
FREE = ("run", "command", "output", "data", "debug", "resume_from_checkpoint")  # may differ


def check_options(options: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, or None; ValueError for what cannot be, or not in this run."""
    if not options.output or not options.data:
        raise ValueError("--output and --data must not be empty")
    folder, data = Path(options.output), Path(options.data)
    if data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"--output {folder} must lie outside of --data {data}: its log would be read as text"
        )
    run_config(options, options.batch_size)
    split([{"input_ids": []}] * 2, options.validation_split)
    checkpoint = check_folder(folder, options.resume_from_checkpoint)
    if checkpoint is not None:
        path = folder / OPTIONS
        compare(path, read_settings(path, checkpoint), _asked(options))
    return checkpoint


def write_options(options: argparse.Namespace) -> None:
    """Begin a run's directory with what was asked for."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder / OPTIONS, _asked(options))


def run_config(options: argparse.Namespace, rows: int) -> TrainConfig:
    """The numbers of a run that learns so many rows; ValueError if they make none."""
    for name in ("batch_size", "gradient_accumulation_steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if not 0 < options.num_train_epochs < math.inf:
        raise ValueError(
            f"num_train_epochs must be a positive number, got {options.num_train_epochs}"
        )
    if not 0 <= options.warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio must be in [0, 1], got {options.warmup_ratio}")
    epoch = -(-rows // (options.batch_size * options.gradient_accumulation_steps))
    steps = options.max_steps or max(1, round(options.num_train_epochs * epoch))
    return TrainConfig(
        max_steps=steps,
        learning_rate=options.learning_rate,
        warmup_steps=int(steps * options.warmup_ratio),
        min_lr_rate=0.1,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=options.optim,
        bf16=options.bf16,
        eval_steps=options.eval_steps or min(epoch, steps),
        save_steps=options.save_steps or options.eval_steps or min(epoch, steps),
        early_stopping_patience=options.early_stopping_patience,
        seed=options.seed,
    )


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides what a run does; the text by its size, for it may have been moved."""
    asked = {name: value for name, value in vars(options).items() if name not in FREE}
    return {**asked, "bytes of text": sum(f.stat().st_size for f in find_files(options.data))}
