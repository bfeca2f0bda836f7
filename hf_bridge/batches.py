"""Beside step 13: rows of ids to batches, by transformers' collators.

Left alone, DataCollatorForLanguageModeling(mlm=False) takes the padding's id for padding, and
since GPT-2 pads with its end token, the end token is never learned: DataCollatorForSeq2Seq, given
the labels, pads them by place. The masked collator draws from a generator of its own, which is
set here from batch to batch, so that batch i is the same whenever it is asked for.

Twin: minigpt/batches.py.  Proof: tests/test_data.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch import Tensor
from torch.utils.data import Subset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
)

IGNORED = -100
Example = Mapping[str, Sequence[int]]
Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Example], torch.Generator], Batch]


@dataclass(frozen=True)
class Causal:
    """DataCollatorForSeq2Seq, whose labels are the ids themselves unless an example has its own.

    >>> batch = Causal(pad_token_id=0)([{"input_ids": [5, 6, 0]}, {"input_ids": [7]}])
    >>> batch["labels"].tolist()
    [[5, 6, 0], [7, -100, -100]]
    """

    pad_token_id: int
    max_length: int | None = None

    def __call__(
        self, examples: Sequence[Example], generator: torch.Generator | None = None
    ) -> Batch:
        rows = [
            {
                "input_ids": list(example["input_ids"][: self.max_length]),
                "labels": list(example.get("labels", example["input_ids"])[: self.max_length]),
            }
            for example in examples
        ]
        tokenizer = _numbers(frozenset({self.pad_token_id}), self.pad_token_id)
        return dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)(rows))


@dataclass(frozen=True)
class Masked:
    """DataCollatorForLanguageModeling, drawing from the generator of the batch."""

    pad_token_id: int
    mask_token_id: int
    vocab_size: int
    special_ids: frozenset[int] = frozenset()
    mlm_probability: float = 0.15
    max_length: int | None = None

    def __post_init__(self) -> None:
        _check_rate("mlm_probability", self.mlm_probability)
        for name in ("pad_token_id", "mask_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} must be in [0, {self.vocab_size}), the vocabulary, "
                    f"got {getattr(self, name)}"
                )

    def __call__(
        self, examples: Sequence[Example], generator: torch.Generator | None = None
    ) -> Batch:
        tokenizer = _numbers(range(self.vocab_size), self.pad_token_id, self.mask_token_id)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.mlm_probability)
        collator.generator = generator
        rows = [list(example["input_ids"][: self.max_length]) for example in examples]
        specials = [[int(i in self.special_ids) for i in row] for row in rows]
        return dict(
            collator(
                [
                    {"input_ids": row, "special_tokens_mask": special}
                    for row, special in zip(rows, specials)
                ]
            )
        )


def mask_chunks(
    examples: Sequence[Example],
    *,
    mask_token_id: int,
    rate: float = 0.10,
    generator: torch.Generator | None = None,
) -> list[Example]:
    """Static masking of whole chunks, by the masked collator: each is one token to it.

    >>> mask_chunks([{"input_ids": [5, 6]}], mask_token_id=9, rate=1.0)
    [{'input_ids': [9, 9], 'labels': [5, 6]}]
    """
    _check_rate("rate", rate)
    # One row in which a chunk is a token: 0, or 1 where the collator has masked it.
    collator = DataCollatorForLanguageModeling(
        _numbers(range(3), 2, 1),
        mlm_probability=rate,
        mask_replace_prob=1.0,
        random_replace_prob=0.0,
    )
    collator.generator = generator
    row = {"input_ids": [0] * len(examples), "special_tokens_mask": [0] * len(examples)}
    masked: list[Example] = []
    for example, hide in zip(examples, collator([row])["input_ids"][0].tolist()):
        ids = list(example["input_ids"])
        mask, ignored = [mask_token_id] * len(ids), [IGNORED] * len(ids)
        masked.append({"input_ids": mask if hide else ids, "labels": ids if hide else ignored})
    return masked


class Batches:
    """Batch i of an endless shuffled reading of the rows; each epoch has an order of its own.

    A DataLoader gives its batches one after the other; asking for the i-th makes an exact resume
    a matter of counting.
    """

    def __init__(
        self, rows: Sequence[Example] | Subset, batch_size: int, collate: Collate, *, seed: int
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(rows) < batch_size:
            raise ValueError(
                f"batch_size must be at most the number of rows, {len(rows)}, got {batch_size}: "
                "give more data or shorter chunks"
            )
        self.rows, self.batch_size = rows, batch_size
        self.collate, self.seed = collate, seed
        self._order = lru_cache(maxsize=2)(self._draw)  # a batch touches two epochs at most

    def __call__(self, i: int) -> Batch:
        places = range(i * self.batch_size, (i + 1) * self.batch_size)
        pairs = [divmod(place, len(self.rows)) for place in places]
        chosen = [self.rows[int(self._order(epoch)[k])] for epoch, k in pairs]
        return self.collate(chosen, seeded(self.seed, "batch", i))

    def _draw(self, epoch: int) -> Tensor:
        """The order of the rows in this epoch, (N,)."""
        return torch.randperm(len(self.rows), generator=seeded(self.seed, "epoch", epoch))


def split(rows: Sequence[Example], share: float) -> tuple[Subset, Subset]:
    """Rows to learn, and at least one, a share of them, to evaluate, at regular distances.

    torch's random_split would draw them; these are the same in every run.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to evaluate must be in (0, 1), got {share}")
    if len(rows) < 2:
        raise ValueError(
            f"at least 2 rows are needed, one of them to evaluate, got {len(rows)}: "
            "give more data or shorter chunks"
        )
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    held = {int((i + 0.5) * len(rows) / count): None for i in range(count)}
    learned = [i for i in range(len(rows)) if i not in held]
    whole: Any = rows  # whatever has a length and places is a data set to torch
    return Subset(whole, learned), Subset(whole, list(held))


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator for one purpose of one run, the same as minigpt's."""
    from random import Random

    return torch.Generator().manual_seed(Random(f"{seed} {purpose} {number}").getrandbits(63))


@lru_cache(maxsize=4)
def _numbers(ids: Iterable[int], pad: int, mask: int | None = None) -> PreTrainedTokenizerFast:
    """What a collator asks a tokenizer for: how to pad, the mask's id, how many words there are."""
    backend = Backend(models.WordLevel({str(i): i for i in ids}, unk_token=str(pad)))
    names = {"pad_token": str(pad)} | ({} if mask is None else {"mask_token": str(mask)})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {rate}")
