"""Beside step 13: rows of ids to batches, each a pure function of its number.

    rows -> shuffled anew each epoch -> B of them -> collated: cut, padded, labelled

A label is the token to predict at its own place (the loss shifts it), or -100: not to be learned.

Twin: hf_bridge/batches.py.  Proof: tests/test_data.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100

Example = Mapping[str, Sequence[int]]  # "input_ids", perhaps "labels"
Batch = dict[str, Tensor]  # "input_ids", "labels", "attention_mask": (B, T)
Collate = Callable[[Sequence[Example], torch.Generator], Batch]


@dataclass(frozen=True)
class Causal:
    """For predicting the next token: rows cut at `max_length`, padded to their batch's longest.

    Padding is told by its place, not by its id: GPT-2 pads with its end token, and a label that
    disappears wherever that id stands would leave a model that never stops.

    >>> batch = Causal(pad_token_id=0)([{"input_ids": [5, 6, 0]}, {"input_ids": [7]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6, 0], [7, 0, 0]], [[5, 6, 0], [7, -100, -100]])
    """

    pad_token_id: int
    max_length: int | None = None

    def __call__(
        self, examples: Sequence[Example], generator: torch.Generator | None = None
    ) -> Batch:
        rows = [example["input_ids"][: self.max_length] for example in examples]
        labels = [
            example.get("labels", example["input_ids"])[: self.max_length] for example in examples
        ]
        return {
            "input_ids": _pad(rows, self.pad_token_id),  # (B, T)
            "labels": _pad(labels, IGNORED),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0),
        }


@dataclass(frozen=True)
class Masked:
    """For filling in hidden tokens: chosen anew at each call (Devlin et al. 2019, section 3.1).

    Each token is chosen with `mlm_probability`; of the chosen, 80 % become the mask token, 10 % a
    random one, 10 % stay, and only they have labels. Special tokens are never chosen. The draws
    are those of transformers' collator, in its order.
    """

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
        batch = Causal(self.pad_token_id, self.max_length)(examples)
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        specials = torch.tensor(sorted(self.special_ids), dtype=ids.dtype)
        rate = torch.full(ids.shape, self.mlm_probability)
        rate = rate.masked_fill(~real | torch.isin(ids, specials), 0.0)
        chosen = torch.bernoulli(rate, generator=generator).bool()
        to_mask = torch.bernoulli(torch.full(ids.shape, 0.8), generator=generator).bool()
        # Half of the rest: 10 % of all that are chosen.
        to_random = torch.bernoulli(torch.full(ids.shape, 0.5), generator=generator).bool()
        words = torch.randint(self.vocab_size, ids.shape, generator=generator)
        labels = ids.masked_fill(~chosen, IGNORED)
        ids = torch.where(chosen & ~to_mask & to_random, words, ids)
        ids = ids.masked_fill(chosen & to_mask, self.mask_token_id)
        return {**batch, "input_ids": ids, "labels": labels}


def mask_chunks(
    examples: Sequence[Example],
    *,
    mask_token_id: int,
    rate: float = 0.10,
    generator: torch.Generator | None = None,
) -> list[Example]:
    """Static masking: a part of the chunks, drawn once, is hidden whole; the others have no labels.

    >>> mask_chunks([{"input_ids": [5, 6]}], mask_token_id=9, rate=1.0)
    [{'input_ids': [9, 9], 'labels': [5, 6]}]
    """
    _check_rate("rate", rate)
    hidden = torch.bernoulli(torch.full((len(examples),), rate), generator=generator).bool()
    masked: list[Example] = []
    for example, hide in zip(examples, hidden.tolist()):
        ids = list(example["input_ids"])
        n = len(ids)
        masked.append(
            {"input_ids": [mask_token_id] * n, "labels": ids}
            if hide
            else {"input_ids": ids, "labels": [IGNORED] * n}
        )
    return masked


class Batches:
    """Batch i of an endless shuffled reading of the rows; each epoch has an order of its own.

    A batch may reach from one epoch into the next, so all are full.

    >>> rows = [{"input_ids": [i, i]} for i in range(5)]
    >>> batches = Batches(rows, 2, Causal(pad_token_id=0), seed=0)
    >>> first_epoch = torch.cat([batches(i)["input_ids"][:, 0] for i in range(3)])[:5]
    >>> sorted(first_epoch.tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, rows: Sequence[Example], batch_size: int, collate: Collate, *, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(rows) < batch_size:
            raise ValueError(
                f"batch_size must be at most the number of rows, {len(rows)}, got {batch_size}: "
                "give more data or shorter chunks"
            )
        self.rows = rows
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def __call__(self, i: int) -> Batch:
        places = range(i * self.batch_size, (i + 1) * self.batch_size)
        pairs = [divmod(place, len(self.rows)) for place in places]
        chosen = [self.rows[int(self._order(epoch)[k])] for epoch, k in pairs]
        return self.collate(chosen, seeded(self.seed, "batch", i))

    def _order(self, epoch: int) -> Tensor:
        """(N,): the order of the rows in this epoch. A batch touches at most two."""
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            generator = seeded(self.seed, "epoch", epoch)
            self._orders[epoch] = torch.randperm(len(self.rows), generator=generator)
        return self._orders[epoch]


class Some(Sequence):
    """The rows of a sequence that stand at these places, read when they are asked for."""

    def __init__(self, rows: Sequence[Example], places: Sequence[int]):
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.rows[place] for place in self.places[i]]
        return self.rows[self.places[i]]


def split(rows: Sequence[Example], share: float) -> tuple[Some, Some]:
    """Rows to learn, and at least one, a share of them, to evaluate, at regular distances.

    A corpus is seldom the same at its end as elsewhere.

    >>> learned, held = split([{"input_ids": [i]} for i in range(6)], 1 / 3)
    >>> held[:]
    [{'input_ids': [1]}, {'input_ids': [4]}]
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to evaluate must be in (0, 1), got {share}")
    if len(rows) < 2:
        raise ValueError(
            f"at least 2 rows are needed, one of them to evaluate, got {len(rows)}: "
            "give more data or shorter chunks"
        )
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    held = [int((i + 0.5) * len(rows) / count) for i in range(count)]
    held_set = set(held)
    return Some(rows, [i for i in range(len(rows)) if i not in held_set]), Some(rows, held)


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator for one purpose of one run, so that no two draw the same numbers."""
    from random import Random

    return torch.Generator().manual_seed(Random(f"{seed} {purpose} {number}").getrandbits(63))


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of unequal length -> (B, T), filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows],
        batch_first=True,
        padding_value=value,
    )


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {rate}")
