"""Step 14: one loop that trains whatever parameters require grad: all of them, LoRA's or adapters'.

    for each step: update, log;  now and then: evaluate, keep the best, keep a checkpoint

A step's batches are a pure function of its number, and so is its dropout. What a run does after
step n therefore depends on nothing but the weights and moments at step n, and a run that was
killed goes on as if it had not been. What an update is: optimize.py.

Before: data.py.  After: metrics.py.  Twin: hf_bridge/train.py.  Proof: tests/test_train.py.
"""

import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from minigpt import runs
from minigpt.config import to_dict
from minigpt.lora import LowRank
from minigpt.model import GPT
from minigpt.optimize import (
    Batch,
    Record,
    TrainConfig,
    count_tokens,
    learning_rate,
    make_optimizer,
    processes,
    summed_loss,
    update,
)

__all__ = [
    "Batch",
    "Record",
    "TrainConfig",
    "count_tokens",
    "learning_rate",
    "make_optimizer",
    "summed_loss",
    "train",
]


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
    """Train the model in place and return the log, one record a step and one an evaluation.

    `batches(i)` gives the i-th batch of the run, always the same one. `evaluate` is called with
    the model in eval mode and returns numbers, among them `metric_for_best_model`; at a better
    one the model is saved in `output_dir`/best, by `save` if it is no plain GPT (lora.save). The
    folder also holds log, checkpoints and curves: see runs.py.

    Raises FloatingPointError, before the weights are touched, if a loss or gradient is no number,
    ValueError for a folder or checkpoint of another run, OSError if the disk is full; the last
    checkpoint and the best model stay.
    """
    from tqdm import tqdm

    rank, _ = processes()
    folder = None if output_dir is None else Path(output_dir)
    optimizer = make_optimizer(model, config)
    settings = _settings(model, batches, config)
    state = _start(folder, model, optimizer, settings, resume_from_checkpoint)
    if rank != 0:  # every process computes the same; one of them writes
        folder, progress = None, False
    bar = tqdm(
        total=config.max_steps,
        initial=state["step"],
        unit="step",
        disable=None if progress else True,
    )
    with bar, runs.Log(folder, state["step"]) as log:
        while state["step"] < config.max_steps and not _stopped(state, config):
            log.write(line := update(model, batches, optimizer, state["step"], config))
            state["step"] += 1
            bar.update()
            bar.set_postfix(_shown(line))
            last = state["step"] == config.max_steps
            if evaluate is not None and (last or _due(config.eval_steps, state["step"])):
                log.write(line := _evaluated(model, evaluate, state["step"]))
                if progress:
                    bar.write(_told(line), file=sys.stderr)
                if _better(line, state, config) and folder is not None:
                    (save or GPT.save_pretrained)(model, folder / runs.BEST)
            last = last or _stopped(state, config)
            due = config.save_steps and (last or _due(config.save_steps, state["step"]))
            if due and folder is not None:
                runs.save_checkpoint(folder, model, optimizer, {**state, "settings": settings})
                runs.draw_curves(log.records, folder / runs.CURVES)
        if folder is not None:
            runs.draw_curves(log.records, folder / runs.CURVES)
    model.eval()
    return log.records


def _start(
    folder: Path | None,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    settings: Record,
    resume: bool,
) -> Record:
    """Where the run stands: at its beginning, or at its newest checkpoint."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = runs.check_folder(folder, resume)
    if checkpoint is None:
        return {"step": 0, "best": None, "waited": 0}
    return runs.load_checkpoint(checkpoint, model, optimizer, settings)


def _settings(model: GPT, batches: Callable[[int], Batch], config: TrainConfig) -> Record:
    """What must be equal for a run to go on: numbers, model, trained parameters, LoRA, data."""
    trained = {name: str(tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    adapters = {  # of these, A and B show the rank only
        path.rpartition(".")[2]: asdict(layer.config)
        for path, layer in model.named_modules()
        if isinstance(layer, LowRank)
    }
    first = batches(0)["input_ids"]
    return {
        **asdict(config),
        "model": to_dict(model.config),
        "trained": trained,
        "adapters": adapters,
        "first batch": zlib.crc32(first.cpu().contiguous().numpy().tobytes()),
    }


def _evaluated(model: GPT, evaluate: Callable[[GPT], Record], step: int) -> Record:
    model.eval()
    try:
        with torch.inference_mode():
            return {"step": step} | {f"eval_{k}": value for k, value in evaluate(model).items()}
    except FloatingPointError as error:
        raise FloatingPointError(f"the evaluation after step {step} failed: {error}") from error


def _better(line: Record, state: Record, config: TrainConfig) -> bool:
    """Whether this evaluation is the best so far; the state takes note."""
    name = f"eval_{config.metric_for_best_model}"
    if name not in line:
        raise ValueError(f"evaluate must return {name.removeprefix('eval_')}, got {_told(line)}")
    value, best = line[name], state["best"]
    better = best is None or (value > best if config.greater_is_better else value < best)
    state["best"] = value if better else best
    state["waited"] = 0 if better else state["waited"] + 1
    return better


def _stopped(state: Record, config: TrainConfig) -> bool:
    return 0 < config.early_stopping_patience <= state["waited"]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _shown(line: Record) -> dict[str, str]:
    """A step's record for the progress bar."""
    return {
        "loss": f"{line['loss']:.3f}",
        "lr": f"{line['learning_rate']:.1e}",
        "tokens/s": f"{line['tokens'] / line['seconds']:,.0f}",
    }


def _told(line: Record) -> str:
    """An evaluation's record as one line: step 20  loss 3.2  perplexity 24.5"""
    return "  ".join(f"{name.removeprefix('eval_')} {value:,.4g}" for name, value in line.items())
