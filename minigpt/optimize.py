"""Beside step 14: one update of the weights, from the batches of one step.

    g     = gradient of  sum of -log p(token) over the step's tokens / their number
    m, v  = moving means of g and g^2                     (Kingma & Ba 2015, algorithm 1)
    w    -= rate(step) * (m^ / (sqrt(v^) + eps) + weight_decay * w)
                                                          (Loshchilov & Hutter 2019, algorithm 2)

That is AdamW; matrices can learn by Muon instead: muon.py.

Several processes share the rows of each batch and add up their gradients, all divided by the
number of tokens in the whole step: however a step is divided into batches and processes, it is
the same step.

Twin: hf_bridge/optimize.py.  Proof: tests/test_train.py.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.batches import IGNORED
from minigpt.model import GPT
from minigpt.muon import Muon

Batch = Mapping[str, Tensor]  # "input_ids" and "labels" (B, T), perhaps "attention_mask"
Record = dict[str, Any]
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; names are those of transformers' TrainingArguments where it has one.

    A step is one update of the weights, from `gradient_accumulation_steps` batches. Weight decay
    pulls on matrices only: an embedding's rows are seen rarely, and a bias or a norm has no
    reason to be small.

    >>> TrainConfig(max_steps=10, warmup_steps=20)
    Traceback (most recent call last):
    ValueError: warmup_steps must be in [0, max_steps], got 20 of 10
    """

    max_steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    min_lr_rate: float = 0.0  # where the cosine ends, as a part of learning_rate
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0  # 0: no clipping
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    optim: str = "adamw"  # or "muon", for the matrices
    bf16: bool = False  # compute in bfloat16 by autocast; weights and moments stay as they are
    eval_steps: int = 0  # evaluate every so many steps, and at the end; 0: only at the end
    save_steps: int = 0  # keep a checkpoint every so many steps, and at the end; 0: none
    metric_for_best_model: str = "perplexity"
    greater_is_better: bool = False
    early_stopping_patience: int = (
        0  # stop after so many evaluations without a better one; 0: never
    )
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "weight_decay",
            "max_grad_norm",
            "eval_steps",
            "save_steps",
            "early_stopping_patience",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "adam_epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(
                f"warmup_steps must be in [0, max_steps], "
                f"got {self.warmup_steps} of {self.max_steps}"
            )
        if not 0 <= self.min_lr_rate <= 1:
            raise ValueError(f"min_lr_rate must be in [0, 1], got {self.min_lr_rate}")
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {self.optim!r}")
        if not 0 <= self.seed < 2**32:  # numpy, and so transformers, takes no other
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step, the first being 0: up in a line, then down in half a cosine.

    >>> config = TrainConfig(max_steps=6, warmup_steps=2, learning_rate=1.0, min_lr_rate=0.1)
    >>> [round(learning_rate(step, config), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_rate + (1 - config.min_lr_rate) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW or Muon over the parameters that require grad, the decaying matrices first.

    Raises ValueError if there are none.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires grad: there is nothing to train")
    matrices = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    kind = Muon if config.optim == "muon" else torch.optim.AdamW
    return kind(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def summed_loss(model: GPT, batch: Batch) -> Tensor:
    """-log p of every token that counts, added up: a scalar, to be divided by `count_tokens`.

    The labels stand where their tokens stand, and are shifted here, as in transformers: position
    t predicts label t + 1. Only positions whose label counts go through the head, and their
    logits are compared in float32 at least. Rows are padded on the left, or on the right; raises
    ValueError for a mask with a hole.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    model.check_ids(ids, mask)
    if mask is not None and (mask[:, 1:] <= mask[:, :-1]).all():
        mask = None  # padding on the right: no real token ever looks at it
    x = model.hidden(ids, attention_mask=mask)[:, :-1].flatten(0, 1)  # (B * (T-1), C)
    targets = labels[:, 1:].flatten()
    counting = (targets != IGNORED).nonzero().squeeze(1)  # (N,)
    logits = model.head(x.index_select(0, counting))  # (N, V)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, targets[counting], reduction="sum")


def count_tokens(batch: Batch) -> int:
    """How many labels of a batch are predicted: neither ignored nor the first of their row."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def update(
    model: GPT,
    batches: Callable[[int], Batch],
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainConfig,
) -> Record:
    """One step: the gradients of all its batches, clipped, then the optimizer."""
    start = time.perf_counter()
    rank, world = processes()
    model.train()
    numbers = range(
        step * config.gradient_accumulation_steps, (step + 1) * config.gradient_accumulation_steps
    )
    whole = [batches(i) for i in numbers]
    tokens = sum(map(count_tokens, whole))
    if not tokens:
        raise ValueError(f"step {step + 1} has no token to learn: every label is {IGNORED}")

    losses = []
    with _chance(config.seed, step, rank, model.device):
        for batch in whole:
            mine = {name: _share(tensor, rank, world) for name, tensor in batch.items()}
            mine = {name: tensor.to(model.device) for name, tensor in mine.items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
                loss = summed_loss(model, mine) / tokens
            loss.backward()
            losses.append(loss.detach())
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    total = _add_up(torch.stack(losses))  # (gradient_accumulation_steps,)
    for p in trained:
        if p.grad is not None:
            _add_up(p.grad)
    for i, loss in zip(numbers, total):
        _check_finite("loss", loss, step, i)
    norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
    _check_finite("gradient", norm, step, numbers[-1])

    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {
        "step": step + 1,
        "loss": total.sum().item(),
        "grad_norm": norm.item(),
        "learning_rate": rate,
        "tokens": tokens,
        "seconds": time.perf_counter() - start,
    }


def processes() -> tuple[int, int]:
    """(rank, world): which process this is, and of how many."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _share(tensor: Tensor, rank: int, world: int) -> Tensor:
    """A process's rows of a batch: (B, T) -> (about B / world, T)."""
    if len(tensor) < world:
        raise ValueError(f"a batch needs a row for each of {world} processes, got {len(tensor)}")
    return tensor[rank::world]


def _add_up(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over the processes."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def _chance(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from the global generator: give it this step's seed, and put it back after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((rank << 40) + seed * 1_000_003 + step)
        yield


def _check_finite(what: str, value: Tensor, step: int, batch: int) -> None:
    if not value.isfinite():
        raise FloatingPointError(
            f"the {what} of step {step + 1} (batch {batch}) is {value.item()}: "
            "lower the learning rate, or look at that batch"
        )
