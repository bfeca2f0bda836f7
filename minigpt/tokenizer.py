"""Step 2: text to token ids and back, by byte-level BPE.

    text -> words (a regular expression) -> UTF-8 bytes -> merge the pair learned earliest, until
    none is left

Sennrich et al. 2016, section 3.2, on bytes as in Radford et al. 2019, section 2.2: since every
byte is a token, no text is unknown. How the pairs are learned is merges.py's, how Hugging Face
writes them down tokenizer_files.py's.

Before: config.py.  After: mask.py.  Twin: hf_bridge/tokenizer.py.  Proof: tests/test_tokenizer.py.
"""

import codecs
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import regex

from minigpt import tokenizer_files
from minigpt.files import resolve
from minigpt.merges import Pair, join, learn

# GPT-2's cut into words: contractions; letters, digits, others, each with a space before; spaces.
# It is case sensitive and knows no accents by decomposition, as published.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


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


def spell(word: str) -> str:
    """A word as the letters of its UTF-8 bytes.

    >>> spell(" né")
    'ĠnÃ©'
    """
    return "".join(byte_letters()[byte] for byte in word.encode())


class Tokenizer:
    """A vocabulary, the merges in the order they were learned, and the special tokens.

    `special_tokens` are ids of their own that no text contains: encode makes them only where it
    is told to. Those `shown` belong to a reply's text, as <think> may: decode never skips them.

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
        self.vocab = vocab
        self.merges = list(merges)
        self.special_tokens = special_tokens or {}
        self.eos_token = eos_token
        self.chat_template = chat_template
        self.shown = frozenset(shown)
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
        if eos_token is not None and eos_token not in self.special_tokens:
            raise ValueError(f"eos_token must be one of the special tokens, got {eos_token!r}")

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
                text = self._special_ids[i]
                skipped = skip_special_tokens and text not in self.shown
                pieces.append(b"" if skipped else text.encode())
            elif i in self._letters:
                pieces.append(bytes(letter_bytes()[letter] for letter in self._letters[i]))
            elif i < 0 or not skip_special_tokens:  # else of a padded vocabulary: no text either
                raise ValueError(f"token id must be one of the vocabulary's {len(self)}, got {i}")
        return b"".join(pieces)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json and merges.txt, from a directory or a hub id.

        Raises ValueError for files that are missing, damaged, or of another kind of tokenizer.
        """
        folder = resolve(name_or_path)
        parts = tokenizer_files.read(folder)
        try:
            return cls(**parts._asdict())
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template for transformers."""
        parts = (self.vocab, self.merges, self.special_tokens, self.eos_token, self.chat_template)
        tokenizer_files.write(Path(folder), tokenizer_files.Parts(*parts, self.shown))

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode: {error}") from error
        return [i for word in WORD.findall(text) for i in self._word_ids(word)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Merge one word's bytes, the earliest learned pair first, leftmost first."""
        parts = list(spell(word))
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda p: self._rank.get(p, len(self._rank)))
            if pair not in self._rank:
                break
            parts = join(parts, pair)
        return tuple(self.vocab[part] for part in parts)


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
    """Learn a vocabulary from texts: the merges of merges.py, on bytes.

    Ids run: special tokens, the 256 bytes, merges, as in the tokenizers library. The first special
    token also ends texts (eos).

    Raises ValueError if vocab_size has no room for the bytes and the special tokens, or for special
    tokens that would share an id.
    """
    letters = sorted(byte_letters().values())
    distinct = len({*letters, *special_tokens}) == len(letters) + len(special_tokens)
    if not distinct or "" in special_tokens:
        raise ValueError(
            "special_tokens must be distinct, not empty and no byte's letter, "
            f"got {list(special_tokens)}"
        )
    vocab = {text: i for i, text in enumerate([*special_tokens, *letters])}
    if vocab_size < len(vocab):
        raise ValueError(
            f"vocab_size must be at least {len(vocab)} (bytes and special tokens), got {vocab_size}"
        )
    counts = Counter(word for text in texts for word in WORD.findall(text))
    words = {spell(word): count for word, count in counts.items()}
    vocab, merges = learn(words, vocab, vocab_size=vocab_size, min_frequency=min_frequency)
    specials = {text: vocab[text] for text in special_tokens}
    return Tokenizer(vocab, merges, specials, eos_token=next(iter(special_tokens), None))


def _alternatives(special_tokens: Iterable[str]) -> regex.Pattern | None:
    """One pattern that captures any of the special tokens, the longest first, or None."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    if not longest_first:
        return None
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
