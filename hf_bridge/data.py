"""Step 13 through the libraries: a corpus to chunks of token ids, cut once, read many times.

Texts are cleaned by the normalizers of tokenizers in corpus.py, rows padded and masked by
transformers' collators in batches.py. Between them the library has only a recipe in its examples,
which joins all texts in memory and drops what fills no chunk; here ids stream by, and all is kept.

Before: adapters.py.  After: train.py.  Twin: minigpt/data.py.  Proof: tests/test_data.py.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from hf_bridge.corpus import read_documents
from hf_bridge.tokenizer import Tokenizer


def tokenize(documents: Iterable[Iterable[str]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Documents -> lists of ids; the end token, if there is one, follows each that is not empty."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if text := "".join(document):
            yield [*tokenizer.encode(text), *end]


def chunk(ids: Iterable[int], chunk_size: int, overlap: int = 0) -> Iterator[list[int]]:
    """Cut a stream of ids; the last chunk may be shorter, and nothing is lost.

    >>> list(chunk(range(8), 4, 1))
    [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    """
    check_chunks(chunk_size, overlap)
    ids = iter(ids)
    kept: list[int] = []
    while new := list(islice(ids, chunk_size - len(kept))):
        yield (row := kept + new)
        kept = row[chunk_size - overlap :]


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
    """Cut a corpus into a JSONL file, which appears when it is whole; the documents' lengths."""
    from tqdm import tqdm

    check_chunks(chunk_size, overlap)
    lengths: list[int] = []

    def documents() -> Iterator[list[int]]:
        texts = read_documents(data, ascii_only=ascii_only)
        bar = {"unit": "documents", "desc": "chunks", "disable": None if progress else True}
        for ids in tokenize(tqdm(texts, **bar), tokenizer):
            lengths.append(len(ids))
            yield ids

    part = Path(f"{path}.part")
    try:
        with open(part, "w", encoding="ascii") as file:
            for row in chunk(chain.from_iterable(documents()), chunk_size, overlap):
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
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as the rows are)
        self._starts = [0]
        for line in self._file:
            self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i):
        self._file.seek(self._starts[range(len(self))[i]])
        return json.loads(self._file.readline())
