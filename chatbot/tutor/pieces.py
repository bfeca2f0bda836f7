"""Text to tokens, with some words cut into other pieces than usual: BPE dropout.

A word that is known by one spelling alone is not known with a typo in it (Provilkova et al. 2020).
"""

from functools import lru_cache
from itertools import pairwise
from random import Random

from minigpt.tokenizer import WORD, Tokenizer, byte_letters

CUT = 0.04  # of the words
LEFT_OUT = 0.25  # of the merges in such a word


class Pieces:
    """Encodes text, now and then with merges left out; the text of the tokens stays the same."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._whole = lru_cache(maxsize=100_000)(tokenizer.encode)  # of a word
        self._rank = {pair: rank for rank, pair in enumerate(tokenizer.merges)}

    def encode(self, random: Random, text: str) -> list[int]:
        """Token ids that decode to the text."""
        ids = []
        for word in WORD.findall(text):
            ids += self._cut(random, word) if random.random() < CUT else self._whole(word)
        return ids

    def _cut(self, random: Random, word: str) -> list[int]:
        parts = [byte_letters()[byte] for byte in word.encode()]
        while True:
            ranked = [
                (rank, i)
                for i, pair in enumerate(pairwise(parts))
                if (rank := self._rank.get(pair)) is not None and random.random() > LEFT_OUT
            ]
            if not ranked:
                return [self.tokenizer.vocab[part] for part in parts]
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
