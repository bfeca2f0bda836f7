"""Step 14 through transformers: the Trainer, and what it must be told to train as minigpt does.

Left alone, it decays embeddings too, cuts batches by process and epoch rather than by number,
divides GPT-2's loss by a count that holds each row's first label, which is never predicted (it
leaves that out for classes named …ForCausalLM), keeps its sum of losses in float32 (and the
model's own loss is computed in float32 even for a float64 model), replaces a NaN loss by an
average, and resumes with other settings after a warning. Its checkpoints hold optimizer and
random state as pickles (read back with weights_only=True) and are not written at one stroke: a
full disk can leave half of one.

Before: data.py.  After: metrics.py.  Twin: minigpt/train.py.  Proof: tests/test_train.py.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_bridge.data import IGNORED
from hf_bridge.model import GPT

Batch = Mapping[str, Tensor]
Record = dict[str, Any]
BEST = "best"


@dataclass(frozen=True)
class TrainConfig:
    """How to train: the fields of TrainingArguments that minigpt has, with minigpt's defaults."""

    max_steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    min_lr_rate: float = 0.0
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    bf16: bool = False
    eval_steps: int = 0
    save_steps: int = 0
    metric_for_best_model: str = "perplexity"
    greater_is_better: bool = False
    early_stopping_patience: int = 0
    seed: int = 0

    def arguments(
        self, output_dir: str | Path, *, use_cpu: bool, evaluates: bool
    ) -> TrainingArguments:
        """The same in the library's words."""
        return TrainingArguments(
            output_dir=str(output_dir),
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": self.min_lr_rate},
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            optim="adamw_torch_fused",
            bf16=self.bf16,
            seed=self.seed,
            use_cpu=use_cpu,
            ddp_backend="gloo" if use_cpu and "WORLD_SIZE" in os.environ else None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=self.eval_steps or self.max_steps,
            metric_for_best_model=f"eval_{self.metric_for_best_model}",
            greater_is_better=self.greater_is_better,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or self.max_steps,
            save_total_limit=1,
            ignore_data_skip=True,  # the batches are numbered: see _Numbered
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step, the first being 0, by the library's schedule.

    >>> config = TrainConfig(max_steps=6, warmup_steps=2, learning_rate=1.0, min_lr_rate=0.1)
    >>> [round(learning_rate(step, config), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate),
        config.warmup_steps,
        config.max_steps,
        min_lr_rate=config.min_lr_rate,
    )
    return config.learning_rate * schedule.lr_lambdas[0](step)


def summed_loss(model: GPT, batch: Batch) -> Tensor:
    """-log p of every token that counts, added up: a scalar."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return _causal_loss(model.hf(**inputs), batch["labels"])


def count_tokens(batch: Batch) -> int:
    """How many labels of a batch are predicted: neither ignored nor the first of their row."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


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
    """Train by the Trainer and return the log; arguments and folder as in minigpt.

    Raises FloatingPointError at a loss that is no number, ValueError for a folder of another run.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = check_folder(folder, resume_from_checkpoint)
        _check_settings(folder, model, config, checkpoint)
        trainer = _Trainer(model, batches, config, folder, evaluate, save, checkpoint, progress)
        with torch.random.fork_rng(), _no_bars():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if output_dir is not None and trainer.is_world_process_zero():
            draw_curves(trainer.records, folder / "curves.png")
    model.eval()
    return trainer.records


class _Trainer(Trainer):
    """The library's loop; every override is one of its differences from ours."""

    def __init__(
        self,
        model: GPT,
        batches: Callable[[int], Batch],
        config: TrainConfig,
        folder: Path,
        evaluate: Callable[[GPT], Record] | None,
        save: Callable[[GPT, Path], None] | None,
        checkpoint: Path | None,
        progress: bool,
    ):
        use_cpu = model.device.type == "cpu"
        args = config.arguments(folder, use_cpu=use_cpu, evaluates=evaluate is not None)
        patience = config.early_stopping_patience
        plain = model.hf.get_base_model() if isinstance(model.hf, PeftModel) else model.hf
        plain.loss_type = "ForCausalLM"  # so that a row's first label is not counted
        super().__init__(
            model.hf,
            args,
            eval_dataset=[],  # not looked at: `evaluate` knows its own
            compute_loss_func=_mean_loss,
            callbacks=[_Steps(progress and args.process_index == 0)]
            + ([EarlyStoppingCallback(patience)] if patience else []),
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.gpt, self.batches, self.folder = model, batches, folder
        self.evaluator = evaluate or (lambda model: {})
        self.saver = save or GPT.save_pretrained
        self.best: float | None = None
        self.losses: list[Tensor] = []
        self.tokens, self.started = 0, time.perf_counter()
        self.first = 0
        self.records: list[Record] = []
        if checkpoint is not None:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            self.first = state["global_step"] * args.gradient_accumulation_steps
            self.best = state["best_metric"]
            lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            self.records = [r for r in map(json.loads, lines) if r["step"] <= state["global_step"]]
        if self.is_world_process_zero():
            lines = [json.dumps(record) + "\n" for record in self.records]
            (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")

    def get_train_dataloader(self) -> DataLoader:
        """Batches by their numbers, each process taking its rows."""
        steps = self.args.max_steps * self.args.gradient_accumulation_steps
        rank, world = self.args.process_index, self.args.world_size
        return DataLoader(
            _Numbered(self.batches, self.first, steps, rank, world), batch_size=None, shuffle=False
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices that are no embeddings; the library's own choice holds the embeddings too."""
        embeddings = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        return [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in embeddings]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the library's, with a note of how many tokens the step has."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.tokens = int(count)
        if not self.tokens:
            step = self.state.global_step + 1
            raise ValueError(f"step {step} has no token to learn: every label is {IGNORED}")
        return samples, count

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """As the library's, but a loss that is no number stops the run."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        if not loss.isfinite():
            step = self.state.global_step
            i = step * self.args.gradient_accumulation_steps + len(self.losses) - 1
            raise FloatingPointError(
                f"the loss of step {step + 1} (batch {i}) is {loss.item()}: "
                "lower the learning rate, or look at that batch"
            )
        return loss

    def log(self, logs, start_time=None) -> None:
        """One record a step, with the exact loss."""
        if "loss" not in logs:
            return
        loss = self.accelerator.gather(torch.stack(self.losses).sum()).mean().item()
        now = time.perf_counter()
        self._record(
            {
                "step": self.state.global_step,
                "loss": loss,
                "grad_norm": logs.get("grad_norm", math.nan),
                "learning_rate": logs["learning_rate"],
                "tokens": self.tokens,
                "seconds": now - self.started,
            }
        )
        self.losses, self.started = [], now
        self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> Record:
        """What `evaluate` returns, logged; the best model is saved at once."""
        self.gpt.eval()
        with torch.inference_mode():
            metrics = {f"eval_{k}": v for k, v in self.evaluator(self.gpt).items()}
        self.started = time.perf_counter()
        name = str(self.args.metric_for_best_model)
        if name not in metrics:
            told = "  ".join(f"{k.removeprefix('eval_')} {v:,.4g}" for k, v in metrics.items())
            raise ValueError(f"evaluate must return {name.removeprefix('eval_')}, got {told}")
        self._record({"step": self.state.global_step, **metrics})
        sign = 1 if self.args.greater_is_better else -1
        if self.best is None or sign * metrics[name] > sign * self.best:
            self.best = metrics[name]
            if self.is_world_process_zero():
                self.saver(self.gpt, self.folder / BEST)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """As the library's, but peft must not ask the base's files whether words were added."""
        if isinstance(self.model, PeftModel):
            if self.args.should_save:
                self.model.save_pretrained(output_dir, save_embedding_layers=False)
        else:
            super().save_model(output_dir, _internal_call)

    def _record(self, record: Record) -> None:
        self.records.append(record)
        if self.is_world_process_zero():
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")


class _Steps(TrainerCallback):
    """A step's own seed for dropout, and the progress bar."""

    def __init__(self, progress: bool):
        from tqdm import tqdm

        self.progress = progress
        self.bar = tqdm(unit="step", disable=None if progress else True)

    def on_train_begin(self, args, state, control, **_others) -> None:
        self.bar.reset(total=state.max_steps)
        self.bar.update(state.global_step)

    def on_step_begin(self, args, state, control, **_others) -> None:
        torch.manual_seed((args.process_index << 40) + args.seed * 1_000_003 + state.global_step)

    def on_log(self, args, state, control, logs=None, **_others) -> None:
        self.bar.update()
        rate = f"{logs['learning_rate']:.1e}"
        self.bar.set_postfix({"loss": f"{logs['loss']:.3f}", "lr": rate})

    def on_step_end(self, args, state, control, **_others) -> None:
        if args.eval_strategy != "no" and state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **_others) -> None:
        told = "  ".join(f"{k.removeprefix('eval_')} {v:,.4g}" for k, v in metrics.items())
        if self.progress:
            self.bar.write(f"step {state.global_step}  {told}", file=sys.stderr)

    def on_train_end(self, args, state, control, **_others) -> None:
        self.bar.close()


class _Numbered(Dataset):
    """The run's batches from number `first` on, each cut to this process's rows."""

    def __init__(
        self, batches: Callable[[int], Batch], first: int, end: int, rank: int, world: int
    ):
        self.batches, self.first, self.end = batches, first, end
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.end

    def __getitem__(self, i: int) -> Batch:
        batch = self.batches(self.first + i)
        rows = len(batch["input_ids"])
        if rows < self.world:
            raise ValueError(f"a batch needs a row for each of {self.world} processes, got {rows}")
        return {name: tensor[self.rank :: self.world] for name, tensor in batch.items()}


def draw_curves(records: list[Record], path: Path) -> None:
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
    figure.savefig(path, dpi=120)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without a progress bar for each file that is written."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _causal_loss(outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The sum over the tokens, in the logits' own precision, at least float32."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)


def _mean_loss(outputs, labels, num_items_in_batch=None) -> Tensor:
    return _causal_loss(outputs, labels) / num_items_in_batch


def check_folder(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run; ValueError if it is not as meant."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume and found is None:
        raise ValueError(f"{folder} has no checkpoint to resume from")
    if found is not None and not resume:
        raise ValueError(f"{found} is there already: resume it, or give another directory")
    return None if found is None else Path(found)


def _check_settings(folder: Path, model: GPT, config: TrainConfig, checkpoint: Path | None) -> None:
    """Write the run's settings, or compare them with those of the run that goes on."""
    path = folder / "settings.json"
    here = {**asdict(config), **{f"model.{k}": v for k, v in model.config.to_dict().items()}}
    here = json.loads(json.dumps(here, default=str))
    if checkpoint is None:
        path.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    wrong = [
        f"{name} is {there.get(name)} there, {here.get(name)} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{checkpoint} is of another run: {', '.join(wrong[:3])}{more}")
