"""Step 2 through transformers: GPT2TokenizerFast, a Rust tokenizer behind a Python class.

Left alone, it turns "<|endoftext|>" in a user's text into the end token (split_special_tokens
stops that, but not for added tokens that are not special), puts in tokens that nobody wrote where
the files say so, adds "<|endoftext|>" to vocabularies that lack it, makes an empty vocabulary of a
directory without tokenizer files and reads one without merges as it is, raises a bare Exception for
damaged ones, and decodes an unknown id as nothing. Its Unicode tables are older than those of the
`regex` package: letters assigned since then are cut differently.

Before: config.py.  After: mask.py.  Twin: minigpt/tokenizer.py.  Proof: tests/test_tokenizer.py.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import GPT2TokenizerFast

from hf_bridge.files import read_json, resolve

Pair = tuple[str, str]
NAMES = ("bos_token", "eos_token", "unk_token")
END = "<|endoftext|>"


class Tokenizer:
    """`hf`, a GPT2TokenizerFast, behind minigpt's calls.

    >>> tokenizer = train(["low low low lower"], vocab_size=260)
    >>> [tokenizer.decode([i]) for i in tokenizer.encode("low lower")]
    ['low', ' low', 'e', 'r']
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[Pair],
        special_tokens: dict[str, int] | None = None,
        *,
        eos_token: str | None = None,
        chat_template: str | None = None,
        shown: Collection[str] = (),
    ):
        special_tokens = special_tokens or {}
        for text in (*map("".join, merges), *pre_tokenizers.ByteLevel.alphabet()):
            if text not in vocab:  # the library would leave such a byte out of the text
                raise ValueError(
                    f"the vocabulary must hold every byte and merge, got none for {text!r}"
                )
        if eos_token is not None and eos_token not in special_tokens:
            raise ValueError(f"eos_token must be one of the special tokens, got {eos_token!r}")
        no_names = dict.fromkeys(NAMES)  # a named token would get the first id, whatever it asks
        self.hf = GPT2TokenizerFast(vocab=vocab, merges=[*map(tuple, merges)], **no_names)
        for text in sorted(special_tokens, key=special_tokens.__getitem__):
            self.hf.add_tokens(AddedToken(text, normalized=False, special=text not in shown))
        if self.special_tokens != special_tokens:  # the library gives ids, it takes none
            raise ValueError(
                "special tokens must be in the vocabulary or have the ids that follow it, "
                f"got {special_tokens}"
            )
        if eos_token is not None:
            self.hf.add_special_tokens(dict.fromkeys(NAMES, eos_token))
        self.hf.chat_template = chat_template

    def __len__(self) -> int:
        return len(self.hf)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that no text contains, and their ids."""
        return self.hf.get_added_vocab()

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, or None."""
        return self.hf.eos_token

    @property
    def eos_token_id(self) -> int | None:
        """Its id, or None."""
        return self.hf.eos_token_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation, or None."""
        return self.hf.chat_template

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Text -> ids; a user's text keeps `allow_special` off."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode: {error}") from error
        if not allow_special:
            return self._plain.encode(text).ids
        return self.hf(text, add_special_tokens=False, verbose=False).input_ids

    @cached_property
    def _plain(self) -> Backend:
        """The same merges without an added token that a text could become."""
        plain = Backend(self.hf.backend_tokenizer.model)
        plain.pre_tokenizer = self.hf.backend_tokenizer.pre_tokenizer
        return plain

    def split_special(self, text: str) -> list[str]:
        """Cut text around the special tokens in it."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})", text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Ids -> text; ValueError for an id that is none of it, unless past it and skipped."""
        ids = [int(i) for i in ids]
        for i in ids:
            unknown = i < 0 or self.hf.convert_ids_to_tokens(i) is None
            if unknown and (i < 0 or not skip_special_tokens):
                raise ValueError(f"token id must be one of the vocabulary's {len(self)}, got {i}")
        return self.hf.decode(ids, skip_special_tokens=skip_special_tokens)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json and merges.txt, from a directory or a hub id.

        Raises ValueError for files that are missing, damaged, or of another kind of tokenizer.
        """
        folder = resolve(name_or_path)
        _check_files(folder)
        names = _read_names(folder)
        tokenizer = cls.__new__(cls)
        try:
            eos = names.get("eos_token")
            eos = eos["content"] if isinstance(eos, dict) else eos
            tokenizer.hf = GPT2TokenizerFast.from_pretrained(
                folder, local_files_only=True, **dict.fromkeys(NAMES)
            )
            if isinstance(tokenizer.hf.chat_template, dict):  # several, by name
                tokenizer.hf.chat_template = tokenizer.hf.chat_template.get("default")
        except Exception as error:  # the library's own, from Rust, has no kind and names no file
            raise ValueError(
                f"the tokenizer in {folder} is damaged ({error}): download it again"
            ) from error
        vocab = tokenizer.hf.get_vocab()
        missing = [text for text in pre_tokenizers.ByteLevel.alphabet() if text not in vocab]
        if missing:
            raise ValueError(
                f"{folder}: the vocabulary must hold every byte and merge, got none for "
                f"{min(missing)!r}"
            )
        eos = END if eos is None and END in vocab else eos
        if eos is not None and eos not in vocab:  # the library would add it, past the model's ids
            raise ValueError(f"{folder}: eos_token must be one of the special tokens, got {eos!r}")
        if eos is not None:
            tokenizer.hf.add_special_tokens(dict.fromkeys(NAMES, eos))
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        self.hf.save_pretrained(folder)


def _read_names(folder: Path) -> Any:
    """What tokenizer_config.json says; ValueError if it asks for other ids."""
    path = folder / "tokenizer_config.json"
    names = read_json(path) if path.is_file() else {}
    if isinstance(names, dict) and names.get("add_prefix_space"):
        raise ValueError(f"{path}: add_prefix_space must be false, this is another tokenizer")
    return names


def _check_files(folder: Path) -> None:
    """ValueError where the library would make do with what is there."""
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
            raise ValueError(
                f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt"
            )
        return
    published = read_json(whole)
    published = published if isinstance(published, dict) else {}
    model, words = published.get("model") or {}, published.get("pre_tokenizer") or {}
    if (
        (model.get("type", "BPE"), words.get("type")) != ("BPE", "ByteLevel")
        or (model.get("dropout") or model.get("ignore_merges") or words.get("add_prefix_space"))
        or (published.get("normalizer") or not words.get("use_regex", True))
    ):
        raise ValueError(f"{whole} must be a byte-level BPE as GPT-2's, this is another tokenizer")
    if "merges" not in model or "vocab" not in model:
        raise ValueError(f"{whole} is damaged (no vocab or no merges): download it again")


class StreamDecoder:
    """Decode ids one by one by the library's DecodeStream, which waits while the text ends in
    U+FFFD. So does one that was written in the text, until the next token; and `flush`, which it
    has not, is the whole text without what was shown.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._shown = 0

    def feed(self, token: int) -> str:
        """The text that this id completes, sometimes nothing yet."""
        self._ids.append(token)
        text = self._stream.step(self.tokenizer.hf.backend_tokenizer, token) or ""
        self._shown += len(text)
        return text

    def flush(self) -> str:
        """What is still held back, at the end of a reply."""
        whole = self.tokenizer.decode(self._ids, skip_special_tokens=self.skip_special_tokens)
        rest, self._shown = whole[self._shown :], len(whole)
        return rest


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    min_frequency: int = 2,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Learn the merges by the tokenizers library's BpeTrainer; ids run as in minigpt."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    distinct = len({*alphabet, *special_tokens}) == len(alphabet) + len(special_tokens)
    if not distinct or "" in special_tokens:
        raise ValueError(
            "special_tokens must be distinct, not empty and no byte's letter, "
            f"got {list(special_tokens)}"
        )
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special_tokens)} "
            f"(bytes and special tokens), got {vocab_size}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    specials = {text: model["vocab"][text] for text in special_tokens}
    eos = next(iter(special_tokens), None)
    return Tokenizer(model["vocab"], [*map(tuple, model["merges"])], specials, eos_token=eos)
