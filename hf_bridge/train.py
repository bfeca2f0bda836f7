"""Step 14 through transformers: the Trainer, told to train as minigpt does.

What it must be told is in trainer.py; what the numbers mean in its words, in optimize.py. Here a
run begins, or goes on if it is the same run: left alone, the Trainer resumes with other settings
after a warning, and seeds every generator of the process.

Before: data.py.  After: metrics.py.  Twin: minigpt/train.py.  Proof: tests/test_train.py.
"""

import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from peft import PeftModel

from hf_bridge import runs
from hf_bridge.model import GPT
from hf_bridge.optimize import (
    Batch,
    Record,
    TrainConfig,
    count_tokens,
    learning_rate,
    summed_loss,
)
from hf_bridge.trainer import ExactTrainer, Steps
from hf_bridge.weights import quiet

__all__ = [
    "Batch",
    "Record",
    "TrainConfig",
    "count_tokens",
    "learning_rate",
    "summed_loss",
    "train",
]

# peft's fields for what an adapter computes; its A and B show the rank only.
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "qkv")


def train(
    model: GPT,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    *,
    output_dir: str | Path | None = None,
    evaluate: Callable[[GPT], Record] | None = None,
    save: Callable[[GPT, Path], None] | None = None,
    resume_from_checkpoint: bool = False,
    progress: bool = True,
) -> list[Record]:
    """Train by the Trainer and return the log; arguments, folder and errors as in minigpt."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires grad: there is nothing to train")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = runs.check_folder(folder, resume_from_checkpoint)
        settings = _settings(model, batches, config)
        if checkpoint is None:
            runs.write_settings(folder / runs.SETTINGS, settings)
        else:
            path = folder / runs.SETTINGS
            runs.compare(path, runs.read_settings(path, checkpoint), settings)
            runs.check_whole(checkpoint)
        with quiet(), _own_chance(model.device):
            trainer = ExactTrainer(model, batches, config, folder, evaluate, save, checkpoint)
            trainer.add_callback(Steps(config.seed, progress and trainer.journal.writes))
            with _picture(trainer.journal, None if output_dir is None else folder / runs.CURVES):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    model.eval()
    return trainer.journal.records


def _settings(model: GPT, batches: Callable[[int], Batch], config: TrainConfig) -> Record:
    """What must be equal for a run to go on: numbers, model, trained parameters, LoRA, data."""
    adapters = model.hf.peft_config if isinstance(model.hf, PeftModel) else {}
    first = batches(0)["input_ids"]
    return {
        **asdict(config),
        **{f"model.{name}": value for name, value in model.config.to_dict().items()},
        **{f"{name}.{key}": getattr(lora, key) for name, lora in adapters.items() for key in _LORA},
        **{n: str(tuple(p.shape)) for n, p in model.hf.named_parameters() if p.requires_grad},
        "first batch": zlib.crc32(first.cpu().contiguous().numpy().tobytes()),
    }


@contextmanager
def _picture(journal: runs.Log, path: Path | None) -> Iterator[None]:
    """Draw the curves in the end, of an interrupted run too; what has stopped it is not hidden."""
    stopped = True
    try:
        yield
        stopped = False
    finally:
        if path is not None and journal.writes and journal.records:
            with suppress(OSError) if stopped else nullcontext():
                runs.draw_curves(journal.records, path)


@contextmanager
def _own_chance(device: torch.device) -> Iterator[None]:
    """The Trainer seeds every generator of the process; they are put back afterwards."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
