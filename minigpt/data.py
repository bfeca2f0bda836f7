"""Step 13: a corpus of any size to chunks of token ids, cut once, read many times.

    documents -> token ids, joined by the end token -> chunks of K -> JSONL

Chunks of K tokens start every K - overlap tokens. A longer chunk shows a token more of what came
before it and costs memory in proportion; `coverage` tells both.

Before: adapters.py.  After: train.py.  Twin: hf_bridge/data.py.  Proof: tests/test_data.py.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt.config import GPTConfig
from minigpt.corpus import find_files, read_documents
from minigpt.tokenizer import Tokenizer


def tokenize(documents: Iterable[Iterable[str]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Documents -> lists of ids; the end token, if there is one, follows each that is not empty."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        empty = True
        for piece in document:
            empty = empty and not piece
            yield tokenizer.encode(piece)
        if not empty:
            yield end


def chunk(ids: Iterable[int], chunk_size: int, overlap: int = 0) -> Iterator[list[int]]:
    """Cut a stream of ids; the last chunk may be shorter, and nothing is lost.

    >>> list(chunk(range(8), 4, 1))
    [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    >>> list(chunk(range(7), 4, 1))                     # 6 alone would repeat what is there
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    check_chunks(chunk_size, overlap)
    kept: list[int] = []
    new = 0  # how many of those no chunk has held yet
    for i in ids:
        kept.append(i)
        new += 1
        if len(kept) == chunk_size:
            yield kept
            kept, new = kept[chunk_size - overlap :], 0
    if new:
        yield kept


def check_chunks(chunk_size: int, overlap: int, context: int | None = None) -> None:
    """Raise ValueError unless chunks can be cut like this and fit a model's context."""
    if chunk_size < 2:
        raise ValueError(f"chunk_size must be at least 2, to predict one token, got {chunk_size}")
    if not 0 <= overlap < chunk_size:
        raise ValueError(f"overlap must be in [0, chunk_size), got {overlap} of {chunk_size}")
    if context is not None and chunk_size > context:
        raise ValueError(
            f"chunk_size must be at most the model's context of {context}, got {chunk_size}"
        )


def write_chunks(
    data: str | Path,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    chunk_size: int = 512,
    overlap: int = 0,
    ascii_only: bool = False,
    progress: bool = True,
) -> list[int]:
    """Cut a corpus into the JSONL file `path`, one {"input_ids": ...} a line; memory stays small.

    Returns the documents' lengths in tokens, for `coverage`. The file appears when it is whole.
    Raises ValueError if the corpus holds no text.
    """
    from tqdm import tqdm

    check_chunks(chunk_size, overlap)
    path = Path(path)
    lengths: list[int] = []
    size = sum(file.stat().st_size for file in find_files(data))
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="chunks", disable=_hidden(progress))

    def ids() -> Iterator[int]:
        for document in read_documents(data, ascii_only=ascii_only):
            length = 0
            for part in tokenize([_counted(document, bar)], tokenizer):
                length += len(part)
                yield from part
            if length:
                lengths.append(length)

    part = path.with_name(path.name + ".part")
    try:
        with bar, open(part, "w", encoding="ascii") as file:
            for row in chunk(ids(), chunk_size, overlap):
                file.write(json.dumps({"input_ids": row}, separators=(",", ":")) + "\n")
        if not lengths:
            raise ValueError(f"{data} holds no text: there is nothing to learn")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return lengths


class Chunks(Sequence):
    """The rows of a JSONL file, read when they are asked for; only their places are in memory."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = open(self.path, "rb")  # noqa: SIM115 (open as long as the rows are)
        self._starts = array("q", [0])
        for line in self._file:
            self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        self._file.seek(self._starts[i])
        return json.loads(self._file.readline())


@dataclass(frozen=True)
class Coverage:
    """What a chunk size keeps, and what it costs; see `coverage`."""

    chunk_size: int
    overlap: int
    chunks: int
    repeated: float
    context: float
    megabytes: float


def coverage(
    lengths: Iterable[int], config: GPTConfig, chunk_size: int, overlap: int = 0
) -> Coverage:
    """Coverage against memory of one chunk size, for documents of these lengths in tokens.

    `context` is the part of the tokens before a token, in its document and within the model's
    reach, that its chunk shows it, averaged over the corpus; `repeated` how much longer the
    overlap makes an epoch; `megabytes` what a row's activations take in training (float32).

    >>> config = GPTConfig(n_positions=64, n_embd=64, n_layer=2, n_head=2)
    >>> [round(coverage([50, 30], config, size).context, 2) for size in (8, 16, 64)]
    [0.16, 0.34, 0.87]
    >>> round(coverage([50, 30], config, 16, overlap=8).context, 2)
    0.47
    """
    check_chunks(chunk_size, overlap, config.n_positions)
    stride = chunk_size - overlap
    position, seen, there = 0, 0, 0
    for length in lengths:
        for first in range(0, length, 1 << 20):  # a document may be longer than memory is large
            index = torch.arange(first, min(first + (1 << 20), length))
            before = index.clamp(max=config.n_positions - 1)
            place = position + index
            # The first chunk that holds a token is the one that shows the most before it.
            start = ((place - chunk_size) // stride + 1).clamp(min=0) * stride
            seen += int(torch.minimum(before, place - start).sum())
            there += int(before.sum())
        position += length
    chunks = 1 + max(0, -(-(position - chunk_size) // stride))
    stored = position + (chunks - 1) * overlap
    return Coverage(
        chunk_size,
        overlap,
        chunks,
        repeated=stored / max(1, position) - 1,
        context=seen / max(1, there),
        megabytes=chunk_size * activations(config) * 4 / 1e6,
    )


def activations(config: GPTConfig) -> int:
    """Numbers that training keeps per token for the backward pass, with the fused attention.

    A layer keeps its two norms' inputs and outputs, q, k, v, the heads' output and the MLP's
    hidden layer before and after GELU; the end keeps one norm and the logits, as probabilities.
    """
    C = config.n_embd
    layer = 4 * C + 3 * C + C + 2 * config.inner_size
    return config.n_layer * layer + 2 * C + config.vocab_size


def _counted(pieces: Iterable[str], bar) -> Iterator[str]:
    for piece in pieces:
        yield piece
        bar.update(len(piece.encode()))


def _hidden(progress: bool) -> bool | None:
    """tqdm's `disable`: None shows the bar in a terminal only."""
    return None if progress else True
