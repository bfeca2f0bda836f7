"""Rows of tokens to learn from: what they hold and how long they are, from step to step.

    conversations -> a row of ids, and of labels: -100 where the user or the system speaks

Words of the user are sometimes cut into other pieces than usual (BPE dropout, Provilkova et al.
2020), so that a word is not known by one spelling alone.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from chatbot.tutor.corpus import Conversations
from minigpt.tokenizer import WORD, Tokenizer, byte_letters


@dataclass(frozen=True)
class Phase:
    """A part of the training, up to `end` of its steps: how long its rows are, and about what.

    The fields after shapes are those of Conversations.conversation.
    """

    end: float
    shapes: tuple[tuple[int, int, float], ...]  # tokens a row, rows a batch, how often
    personal: float
    styled: float


# First to tell topics apart, the hardest thing: most rows end soon after the tutor has decided what
# it was asked. Then to converse: memory, styles and follow-ups, at all positions of the context.
PHASES = (
    Phase(
        end=0.55,
        shapes=((32, 128, 0.30), (64, 64, 0.22), (128, 32, 0.25), (256, 16, 0.17), (512, 8, 0.06)),
        personal=0.35,
        styled=0.4,
    ),
    Phase(
        end=math.inf,
        shapes=((64, 64, 0.20), (128, 32, 0.35), (256, 16, 0.35), (512, 8, 0.10)),
        personal=0.45,
        styled=0.4,
    ),
)


class Rows:
    """Rows of token ids, cut from conversations: step -> a batch, always the same one."""

    def __init__(
        self, conversations: Conversations, tokenizer: Tokenizer, *, seed: int, steps: int = 10000
    ):
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.seed = seed
        self.steps = steps
        self._rank = {pair: rank for rank, pair in enumerate(tokenizer.merges)}

    def batch(self, step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Rows of ids and of labels, -100 where the user or the system speaks."""
        random = Random(f"{self.seed} {step}")
        phase = next(phase for phase in PHASES if step < phase.end * self.steps)
        shares = [share for *_, share in phase.shapes]
        length, rows, _ = random.choices(phase.shapes, shares)[0]
        pairs = [self.row(random, length, phase) for _ in range(rows)]
        return [ids for ids, _ in pairs], [labels for _, labels in pairs]

    def row(self, random: Random, length: int, phase: "Phase") -> tuple[list[int], list[int]]:
        """The first `length` tokens of a conversation; only the replies are learned."""
        ids: list[int] = []
        labels: list[int] = []
        eos = self.tokenizer.special_tokens["<|endoftext|>"]
        stream = self.conversations.conversation(
            random, personal=phase.personal, styled=phase.styled
        )
        while len(ids) < length:
            message = next(stream)
            role, content = message["role"], message["content"]
            if role == "assistant":
                tokens = self.tokenizer.encode(content)
                labels += [-100, *tokens, eos]
            else:
                tokens = self.encode_varied(random, content)
                labels += [-100] * (len(tokens) + 2)
            ids += [self.tokenizer.special_tokens[f"<|{role}|>"], *tokens, eos]
        return ids[:length], labels[:length]

    def encode_varied(self, random: Random, text: str) -> list[int]:
        """Encode, with some words cut into other pieces: each merge is left out now and then."""
        ids = []
        for word in WORD.findall(text):
            if random.random() < 0.15:
                ids += self._cut(random, word)
            else:
                ids += self.tokenizer.encode(word)
        return ids

    def _cut(self, random: Random, word: str) -> list[int]:
        parts = [byte_letters()[byte] for byte in word.encode()]
        while True:
            ranked = [
                (rank, i)
                for i, pair in enumerate(pairwise(parts))
                if (rank := self._rank.get(pair)) is not None and random.random() > 0.25
            ]
            if not ranked:
                return [self.tokenizer.vocab[part] for part in parts]
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
