"""Beside step 14: what an update is, in the library's words.

Left alone, the Trainer divides GPT-2's loss by a count that holds each row's first label, which is
never predicted (it leaves that out for classes named …ForCausalLM), and the model's own loss is
computed in float32 even for a float64 model: so the loss is summed here. A bare forward counts the
columns of left padding: so positions are told. TrainingArguments takes nearly any number;
TrainConfig checks what minigpt checks.

Twin: minigpt/optimize.py.  Proof: tests/test_train.py.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainingArguments, get_cosine_with_min_lr_schedule_with_warmup

from hf_bridge.batches import IGNORED
from hf_bridge.cache import ContextOverflow
from hf_bridge.mask import left_padding
from hf_bridge.model import GPT

Batch = Mapping[str, Tensor]
Record = dict[str, Any]
OPTIMIZERS = ("adamw", "muon")
_RULES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (lambda x: x >= 1, ("max_steps", "gradient_accumulation_steps")),
    "0 or more": (
        lambda x: x >= 0,
        ("weight_decay", "max_grad_norm", "eval_steps", "save_steps", "early_stopping_patience"),
    ),
    "a positive number": (lambda x: 0 < x < math.inf, ("learning_rate", "adam_epsilon")),
    "in [0, 1)": (lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2")),
    "in [0, 1]": (lambda x: 0 <= x <= 1, ("min_lr_rate",)),
}


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
    optim: str = "adamw"
    bf16: bool = False
    eval_steps: int = 0
    save_steps: int = 0
    metric_for_best_model: str = "perplexity"
    greater_is_better: bool = False
    early_stopping_patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for rule, (holds, names) in _RULES.items():
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, got {value}")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(
                f"warmup_steps must be in [0, max_steps], "
                f"got {self.warmup_steps} of {self.max_steps}"
            )
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {self.optim!r}")
        if not 0 <= self.seed < 2**32:  # numpy, and so the library, takes no other
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")

    def arguments(self, folder: str, *, use_cpu: bool, evaluates: bool) -> TrainingArguments:
        """The same in the library's words; what it does by other rules is left to train.py."""
        return TrainingArguments(
            output_dir=folder,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": self.min_lr_rate},
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm or math.inf,  # at 0 it would not even be measured
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            optim="adamw_torch_fused",
            bf16=self.bf16,
            use_cpu=use_cpu,
            ddp_backend="gloo" if use_cpu and "WORLD_SIZE" in os.environ else None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=self.eval_steps or self.max_steps,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or self.max_steps,
            ignore_data_skip=True,  # the batches are numbered
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
    """-log p of every token that counts, added up: a scalar; errors as in minigpt."""
    check_batch(model, batch)
    inputs = {name: tensor for name, tensor in with_positions(batch).items() if name != "labels"}
    return causal_loss(model.hf(**inputs), batch["labels"])


def check_batch(model: GPT, batch: Batch) -> None:
    """ValueError for tokens of another vocabulary, or more of them than the context holds."""
    ids, P = batch["input_ids"], model.config.n_positions
    model.check_ids(ids, batch.get("attention_mask"))
    if ids.shape[1] > P:
        raise ContextOverflow(ids.shape[1], P)


def with_positions(batch: Batch) -> Batch:
    """A left-padded batch with "position_ids"; ValueError for a mask with a hole."""
    mask = batch.get("attention_mask")
    if mask is None or (mask[:, 1:] <= mask[:, :-1]).all():
        return batch  # padding on the right: a token's position is its column
    left_padding(mask)  # refuses a hole
    return {**batch, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}  # (B, T)


def causal_loss(outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The same of what the model returned, in the logits' own precision, at least float32."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)  # (B * (T-1), V)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)


def count_tokens(batch: Batch) -> int:
    """How many labels of a batch are predicted: neither ignored nor the first of their row."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
