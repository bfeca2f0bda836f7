"""Step 2: text to token ids and back, by byte-level BPE.

    text -> words (a regular expression) -> UTF-8 bytes -> merge the pair learned earliest, until
    none is left

Sennrich et al. 2016, section 3.2, on bytes as in Radford et al. 2019, section 2.2: since every
byte is a token, no text is unknown.

Before: config.py.  After: mask.py.  Twin: hf_bridge/tokenizer.py.  Proof: tests/test_tokenizer.py.
"""

import codecs
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from minigpt.files import read_json, resolve, write_atomically, write_json

# GPT-2's cut into words: contractions; letters, digits, others, each with a space before; spaces.
# It is case sensitive and knows no accents by decomposition, as published.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

Pair = tuple[str, str]


@cache
def byte_letters() -> dict[int, str]:
    """A visible letter for each byte, as vocab.json spells them; printable ones are themselves.

    >>> byte_letters()[ord("A")], byte_letters()[ord(" ")]
    ('A', 'Ġ')
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def letter_bytes() -> dict[str, int]:
    """byte_letters the other way round."""
    return {letter: byte for byte, letter in byte_letters().items()}


class Tokenizer:
    """A vocabulary, the merges in the order they were learned, and the special tokens.

    `special_tokens` are ids of their own that no text contains: encode makes them only where it
    is told to.

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
    ):
        self.vocab = vocab
        self.merges = list(merges)
        self.special_tokens = special_tokens or {}
        self.eos_token = eos_token
        self.chat_template = chat_template
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._letters = {i: letters for letters, i in vocab.items()}
        self._special_ids = {i: text for text, i in self.special_tokens.items()}
        self._special = _alternatives(self.special_tokens)
        self._word_ids = lru_cache(maxsize=1 << 16)(self._encode_word)
        for text in (*map("".join, self.merges), *byte_letters().values()):
            if text not in vocab:
                raise ValueError(
                    f"the vocabulary must hold every byte and merge, got none for {text!r}"
                )

    def __len__(self) -> int:
        return len(self._letters.keys() | self._special_ids.keys())

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, or None."""
        return None if self.eos_token is None else self.special_tokens[self.eos_token]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Text -> ids. A user's text keeps `allow_special` off: it cannot forge a turn's end.

        Raises ValueError for text that is no Unicode (a lone surrogate).
        """
        if not allow_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece in self.split_special(text):
            special = self.special_tokens.get(piece)
            ids += self._encode_plain(piece) if special is None else [special]
        return ids

    def split_special(self, text: str) -> list[str]:
        """Cut text around the special tokens in it: 'a<|end|>b' -> 'a', '<|end|>', 'b'."""
        return [text] if self._special is None else self._special.split(text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD.

        `skip_special_tokens` leaves out ids past the vocabulary too: models pad theirs to a round
        number, and may draw one. Otherwise ValueError for an id that is none of this vocabulary.
        """
        return self.token_bytes(ids, skip_special_tokens=skip_special_tokens).decode(
            "utf-8", errors="replace"
        )

    def token_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """The bytes that ids stand for, whether or not they end inside a character."""
        pieces = []
        for i in ids:
            if i in self._special_ids:
                pieces.append(b"" if skip_special_tokens else self._special_ids[i].encode())
            elif i in self._letters:
                pieces.append(bytes(letter_bytes()[letter] for letter in self._letters[i]))
            elif i < 0 or not skip_special_tokens:  # else of a padded vocabulary: no text either
                raise ValueError(f"token id must be one of the vocabulary's {len(self)}, got {i}")
        return b"".join(pieces)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json and merges.txt, from a directory or a hub id.

        Where a directory holds both, tokenizer.json counts, as in transformers.
        """
        folder = resolve(name_or_path)
        if (folder / "tokenizer.json").is_file():
            vocab, merges, special_tokens = _read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = read_json(folder / "vocab.json")
            merges = _read_merges((folder / "merges.txt").read_text(encoding="utf-8"))
            special_tokens = {t: vocab[t] for t in ("<|endoftext|>",) if t in vocab}
        else:
            raise ValueError(
                f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt"
            )
        return cls(vocab, merges, special_tokens, **_read_chat(folder, special_tokens))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template for transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        if self.eos_token is not None:
            names |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.eos_token)
        write_json(folder / "tokenizer.json", self._tokenizer_json())
        write_json(folder / "tokenizer_config.json", names)
        if self.chat_template is not None:
            write_atomically(folder / "chat_template.jinja", self.chat_template.encode())

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return [i for word in WORD.findall(text) for i in self._word_ids(word)]
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode: {error}") from error

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Merge one word's bytes, the earliest learned pair first, leftmost first."""
        parts = [byte_letters()[byte] for byte in word.encode()]
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda p: self._rank.get(p, len(self._rank)))
            if pair not in self._rank:
                break
            parts = _merge(parts, pair)
        return tuple(self.vocab[part] for part in parts)

    def _tokenizer_json(self) -> dict[str, Any]:
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
                {"id": i, "content": text, **flags, "special": True}
                for text, i in self.special_tokens.items()
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
                "vocab": self.vocab,
                "merges": [list(pair) for pair in self.merges],
            },
        }


class StreamDecoder:
    """Decode ids one by one without ever showing half a character.

    Holds back only bytes that may still become a character. A U+FFFD that was written in the text
    passes.

    >>> tokenizer = train([], vocab_size=256)
    >>> decoder = StreamDecoder(tokenizer)
    >>> [decoder.feed(i) for i in tokenizer.encode("né")], decoder.flush()
    (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that this id completes, often the id's own text, sometimes nothing yet."""
        skip = self.skip_special_tokens
        return self._utf8.decode(self.tokenizer.token_bytes([token], skip_special_tokens=skip))

    def flush(self) -> str:
        """What is still held back, at the end of a reply: U+FFFD for a character never finished."""
        return self._utf8.decode(b"", final=True)


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    min_frequency: int = 2,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Learn the merges: again and again join the most frequent pair of neighbours into a new token.

    Ids run: special tokens, the 256 bytes, merges. Of equally frequent pairs the one with the
    lower ids is taken, as in the tokenizers library, so that both learn the same vocabulary. The
    first special token also ends texts (eos).

    Raises ValueError if vocab_size has no room for the bytes and the special tokens.
    """
    vocab = {text: i for i, text in enumerate([*special_tokens, *sorted(byte_letters().values())])}
    if vocab_size < len(vocab):
        raise ValueError(
            f"vocab_size must be at least {len(vocab)} (bytes and special tokens), got {vocab_size}"
        )
    counts = Counter(word for text in texts for word in WORD.findall(text))
    words = [[byte_letters()[byte] for byte in word.encode()] for word in counts]
    frequency = list(counts.values())

    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)  # the words in which a pair stands
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += frequency[i]
            where[pair].add(i)

    # Most frequent first, then lowest ids. A count that has changed is pushed again in its turn.
    heap = [(-count, vocab[a], vocab[b], (a, b)) for (a, b), count in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(vocab) < vocab_size:
        negative, a, b, pair = heapq.heappop(heap)
        if pairs[pair] != -negative:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], a, b, pair))
            continue
        if -negative < max(min_frequency, 1):
            break
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))
        changed: set[Pair] = set()
        for i in where.pop(pair):
            before, words[i] = words[i], _merge(words[i], pair)
            for old in pairwise(before):
                pairs[old] -= frequency[i]
            for new in pairwise(words[i]):
                pairs[new] += frequency[i]
                where[new].add(i)
                changed.add(new)
        for new in changed:
            heapq.heappush(heap, (-pairs[new], vocab[new[0]], vocab[new[1]], new))
    specials = {text: vocab[text] for text in special_tokens}
    return Tokenizer(vocab, merges, specials, eos_token=next(iter(special_tokens), None))


def _merge(parts: list[str], pair: Pair) -> list[str]:
    """Join every occurrence of the pair, from the left: 'aaa' with ('a', 'a') -> 'aa', 'a'."""
    merged: list[str] = []
    i = 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


def _alternatives(special_tokens: Iterable[str]) -> regex.Pattern | None:
    """One pattern that captures any of the special tokens, the longest first, or None."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    if not longest_first:
        return None
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")


def _read_merges(text: str) -> list[Pair]:
    lines = text.split("\n")
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    return [(a, b) for a, b in pairs]


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[Pair], dict[str, int]]:
    published = read_json(path)
    model = published.get("model", {})
    kind = (model.get("type"), (published.get("pre_tokenizer") or {}).get("type"))
    if kind != ("BPE", "ByteLevel") or published.get("normalizer"):
        raise ValueError(f"{path} must be a byte-level BPE without normalizer, got {kind}")
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    special_tokens = {token["content"]: token["id"] for token in published.get("added_tokens", [])}
    return model["vocab"], merges, special_tokens


def _read_chat(folder: Path, special_tokens: dict[str, int]) -> dict[str, Any]:
    """The end-of-text token and the chat template, from the files where transformers keeps them."""
    path = folder / "tokenizer_config.json"
    names = read_json(path) if path.is_file() else {}
    eos_token = names.get("eos_token")
    if isinstance(eos_token, dict):
        eos_token = eos_token.get("content")
    if eos_token is None and "<|endoftext|>" in special_tokens:
        eos_token = "<|endoftext|>"
    template = folder / "chat_template.jinja"
    chat_template = (
        template.read_text("utf-8") if template.is_file() else names.get("chat_template")
    )
    return {"eos_token": eos_token, "chat_template": chat_template}
