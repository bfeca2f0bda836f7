"""Beside step 2: a tokenizer as files, in Hugging Face's layouts.

    tokenizer.json                vocabulary, merges and special tokens in one; or, as GPT-2 came,
    vocab.json, merges.txt        the first two; the special token is <|endoftext|>
    tokenizer_config.json         which special token ends a text
    chat_template.jinja           how a conversation is written; older models have it in the config

Used by: tokenizer.py.  Proof: tests/test_tokenizer.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.files import read_json, write_atomically, write_json
from minigpt.merges import Pair

END = "<|endoftext|>"


class Parts(NamedTuple):
    """What a Tokenizer is made of."""

    vocab: dict[str, int]
    merges: list[Pair]
    special_tokens: dict[str, int]
    eos_token: str | None
    chat_template: str | None
    shown: frozenset[str]


def read(folder: Path) -> Parts:
    """Read a directory's tokenizer; where it has both layouts, tokenizer.json counts.

    Raises ValueError for files that are missing, damaged, or of another kind of tokenizer.
    """
    whole, vocabulary, pairs = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    shown: frozenset[str] = frozenset()
    if whole.is_file():
        vocab, merges, special_tokens, shown = _read_whole(whole)
    elif vocabulary.is_file() and pairs.is_file():
        published = read_json(vocabulary)
        with _damage(vocabulary):
            vocab = _ids(published)
        with _damage(pairs):
            lines = pairs.read_text(encoding="utf-8").split("\n")
            merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
        special_tokens = {END: vocab[END]} if END in vocab else {}
    else:
        raise ValueError(
            f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt"
        )
    eos_token, chat_template = _read_names(folder)
    if eos_token is None and (END in vocab or END in special_tokens):
        eos_token = END
    if eos_token in vocab:  # the files need not list it among the special tokens
        special_tokens.setdefault(eos_token, vocab[eos_token])
    return Parts(vocab, merges, special_tokens, eos_token, chat_template, shown - {eos_token})


def write(folder: Path, parts: Parts) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, each whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    if parts.eos_token is not None:
        names |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), parts.eos_token)
    write_json(folder / "tokenizer.json", _whole(parts))
    write_json(folder / "tokenizer_config.json", names)
    if parts.chat_template is not None:
        write_atomically(folder / "chat_template.jinja", parts.chat_template.encode())


def _read_whole(path: Path) -> tuple[dict[str, int], list[Pair], dict[str, int], frozenset[str]]:
    published = read_json(path)
    with _damage(path):
        known = _is_byte_level(published)
    if not known:
        raise ValueError(f"{path} must be a byte-level BPE as GPT-2's, this is another tokenizer")
    with _damage(path):
        model = published["model"]
        added = published.get("added_tokens", [])
        special_tokens = {t["content"]: index(t["id"]) for t in added}
        shown = frozenset(t["content"] for t in added if not t["special"])
        merges = [_pair(pair) for pair in model["merges"]]
        return _ids(model["vocab"]), merges, special_tokens, shown


def _is_byte_level(published: Mapping[str, Any]) -> bool:
    """Whether texts are cut as GPT-2 cuts them; any other way would silently give other ids."""
    model, words = published.get("model", {}), published.get("pre_tokenizer") or {}
    return (
        model.get("type", "BPE") == "BPE"  # files from before 2021 leave it out
        and not (model.get("dropout") or model.get("ignore_merges"))
        and words.get("type") == "ByteLevel"
        and words.get("use_regex", True)
        and not (words.get("add_prefix_space") or published.get("normalizer"))
    )


def _read_names(folder: Path) -> tuple[str | None, str | None]:
    """The end-of-text token and the chat template, from the files where transformers keeps them."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    names = read_json(path) if path.is_file() else {}
    with _damage(path):
        eos_token, chat_template = names.get("eos_token"), names.get("chat_template")
        if isinstance(eos_token, dict):
            eos_token = eos_token["content"]
        if isinstance(chat_template, list):  # several, by name
            chat_template = {t["name"]: t["template"] for t in chat_template}.get("default")
    if names.get("add_prefix_space"):
        raise ValueError(f"{path}: add_prefix_space must be false, this is another tokenizer")
    if template.is_file():
        with _damage(template):
            chat_template = template.read_text(encoding="utf-8")
    return eos_token, chat_template


def _ids(vocab: Mapping[str, int]) -> dict[str, int]:
    return {text: index(i) for text, i in vocab.items()}


def _pair(pair: str | list[str]) -> Pair:
    a, b = pair.split(" ") if isinstance(pair, str) else pair
    return a, b


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Name the file whose content is not what it should be."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged ({why}): download it again") from error


def _whole(parts: Parts) -> dict[str, Any]:
    """The content of tokenizer.json."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": text not in parts.shown}
            for text, i in parts.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": parts.vocab,
            "merges": [list(pair) for pair in parts.merges],
        },
    }
