"""Step 13 through transformers and tokenizers: normalizers, DataCollatorForLanguageModeling.

The course's own tool for this is the `datasets` library; a generator and a file serve as well.
Left alone, the causal collator takes the padding's id for padding, and since GPT-2 pads with its
end token, the end token is never learned: the labels are therefore set by place here. The masked
collator draws from a generator of its own, which is set here from batch to batch, so that batch i
is the same whenever it is asked for.

Before: adapters.py.  After: train.py.  Twin: minigpt/data.py.  Proof: tests/test_data.py.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Regex, models, normalizers
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_bridge.tokenizer import Tokenizer

IGNORED = -100
SUFFIXES = (".txt", ".md", ".jsonl")
Example = Mapping[str, Sequence[int]]
Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Example], torch.Generator], Batch]

_SPELLING = [
    normalizers.Replace(Regex(r"\r\n?"), "\n"),
    normalizers.Replace(Regex(r"[\x{0}-\x{8}\x{b}-\x{1f}\x{7f}-\x{9f}\x{feff}]"), ""),
]
_NFC = normalizers.Sequence([*_SPELLING, normalizers.NFC()])
_ASCII = normalizers.Sequence(
    [*_SPELLING, normalizers.NFKD(), normalizers.Replace(Regex(r"[^\x{0}-\x{7f}]"), "")]
)


def clean(text: str, *, ascii_only: bool = False) -> str:
    r"""One spelling for what looks the same, by the library's normalizers.

    >>> clean("cafe\u0301\r\n\x07"), clean("¿Años? 日", ascii_only=True)
    ('café\n', 'Anos? ')
    """
    return (_ASCII if ascii_only else _NFC).normalize_str(text)


def read_documents(path: str | Path, *, ascii_only: bool = False) -> Iterator[Iterator[str]]:
    """Clean documents, each in one piece: a file must fit in memory here, a corpus need not."""
    for file in _files(path):
        for text in [_read(file)] if file.suffix != ".jsonl" else [r["text"] for r in _rows(file)]:
            yield iter([clean(text, ascii_only=ascii_only)])


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """Examples for fine-tuning, as (prompt, completion); the prompt of a plain text is empty."""
    for file in _files(path):
        if file.suffix == ".jsonl":
            for row in _rows(file):
                if "completion" in row:
                    yield clean(row["prompt"]), clean(row["completion"])
                else:
                    yield "", clean(row["text"])
        else:
            parts = re.split(r"\n\s*\n", clean(_read(file)))
            yield from (("", part.strip()) for part in parts if part.strip())


def tokenize(documents: Iterable[Iterable[str]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Documents -> lists of ids; the end token, if there is one, follows each that is not empty."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if text := "".join(document):
            yield [*tokenizer.encode(text), *end]


def chunk(ids: Iterable[int], chunk_size: int, overlap: int = 0) -> Iterator[list[int]]:
    """Cut a stream of ids, as the library's examples do after joining all texts.

    >>> list(chunk(range(8), 4, 1))
    [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    """
    check_chunks(chunk_size, overlap)
    joined = list(ids)
    for start in range(0, max(1, len(joined) - overlap), chunk_size - overlap):
        if joined:
            yield joined[start : start + chunk_size]


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
    """Cut a corpus into a JSONL file; the documents' lengths. Holds all ids in memory."""
    from tqdm import tqdm

    documents = tqdm(
        tokenize(read_documents(data, ascii_only=ascii_only), tokenizer),
        unit="documents",
        disable=None if progress else True,
    )
    parts = list(documents)
    if not parts:
        raise ValueError(f"{data} holds no text: there is nothing to learn")
    rows = chunk(chain.from_iterable(parts), chunk_size, overlap)
    lines = [json.dumps({"input_ids": row}, separators=(",", ":")) + "\n" for row in rows]
    part = Path(f"{path}.part")
    part.write_text("".join(lines), encoding="ascii")
    os.replace(part, path)
    return [len(ids) for ids in parts]


def read_chunks(path: str | Path) -> list[Example]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="ascii").splitlines()]


@dataclass(frozen=True)
class Causal:
    """DataCollatorForLanguageModeling(mlm=False), with labels by place.

    >>> batch = Causal(pad_token_id=0)([{"input_ids": [5, 6, 0]}, {"input_ids": [7]}])
    >>> batch["labels"].tolist()
    [[5, 6, 0], [7, -100, -100]]
    """

    pad_token_id: int
    max_length: int | None = None

    def __call__(
        self, examples: Sequence[Example], generator: torch.Generator | None = None
    ) -> Batch:
        highest = max(max(example["input_ids"], default=0) for example in examples)
        tokenizer = _numbers(max(highest, self.pad_token_id) + 1, self.pad_token_id)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        batch = collator([{"input_ids": e["input_ids"][: self.max_length]} for e in examples])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        for row, example in zip(labels, examples):
            if "labels" in example:
                given = torch.tensor(example["labels"][: self.max_length])
                row[: len(given)] = given
        return {**batch, "labels": labels}


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

    def __call__(
        self, examples: Sequence[Example], generator: torch.Generator | None = None
    ) -> Batch:
        tokenizer = _numbers(self.vocab_size, self.pad_token_id, self.mask_token_id)
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
        _numbers(3, 2, 1), mlm_probability=rate, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    collator.generator = generator
    row = {"input_ids": [0] * len(examples), "special_tokens_mask": [0] * len(examples)}
    hidden = collator([row])["input_ids"][0].tolist()
    return [
        {"input_ids": [mask_token_id] * len(example["input_ids"]), "labels": example["input_ids"]}
        if hide
        else {
            "input_ids": example["input_ids"],
            "labels": [IGNORED] * len(example["input_ids"]),
        }
        for example, hide in zip(examples, hidden)
    ]


class Batches:
    """Batch i of an endless shuffled reading of the rows; each epoch has an order of its own.

    A DataLoader gives its batches one after the other; asking for the i-th makes an exact resume
    a matter of counting.
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

    def __call__(self, i: int) -> Batch:
        places = range(i * self.batch_size, (i + 1) * self.batch_size)
        pairs = [divmod(place, len(self.rows)) for place in places]
        orders = {
            epoch: torch.randperm(len(self.rows), generator=seeded(self.seed, "epoch", epoch))
            for epoch in {epoch for epoch, _ in pairs}
        }
        chosen = [self.rows[int(orders[epoch][k])] for epoch, k in pairs]
        return self.collate(chosen, seeded(self.seed, "batch", i))


def split(rows: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
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
    held = [int((i + 0.5) * len(rows) / count) for i in range(count)]
    return [rows[i] for i in range(len(rows)) if i not in {*held}], [rows[i] for i in held]


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator for one purpose of one run, the same as minigpt's."""
    from random import Random

    return torch.Generator().manual_seed(Random(f"{seed} {purpose} {number}").getrandbits(63))


def _numbers(vocab_size: int, pad: int, mask: int | None = None) -> PreTrainedTokenizerFast:
    """What a collator asks a tokenizer for: how to pad, the mask's id, the vocabulary's size."""
    backend = Backend(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(pad)))
    names = {"pad_token": str(pad)} | ({} if mask is None else {"mask_token": str(mask)})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _files(path: str | Path) -> list[Path]:
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.exists():
        raise ValueError(f"no file or directory {str(path)!r}: check the path")
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"{path} holds no text: no file ends in {', '.join(SUFFIXES)}")
    return files


def _rows(file: Path) -> Iterator[dict[str, str]]:
    """The lines of a .jsonl, each with a text, or a prompt and its completion."""
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not ("text" in row or {"prompt", "completion"} <= {*row}):
            raise ValueError(f'{file}:{number} must be {{"text": …}}, got {line[:40]!r}')
        yield row


def _read(file: Path) -> str:
    content = file.read_bytes()
    if b"\0" in content:
        place = content.index(0)
        raise ValueError(f"{file} must be text, got a zero byte at {place}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise ValueError(
            f"{file} must be UTF-8 text, got byte {wrong:#04x} at {error.start}"
        ) from error


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {rate}")
