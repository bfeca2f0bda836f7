"""Rows of tokens to learn from: what they hold and how long they are, from step to step.

    conversations -> a row of ids, and of labels: -100 where the user or the system speaks

A reply is decided in its first tokens; the others follow from these and from the weights. So the
first phase breaks long replies off, and sees more questions for the same work.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from chatbot.tutor.corpus import Conversations
from chatbot.tutor.pieces import Pieces
from minigpt import Tokenizer
from minigpt.batches import IGNORED

LONG = 20  # tokens; a longer reply may be broken off: few that recall a fact are
DECIDED = 8  # tokens, after which only one reply is left; a style's first words come before
DECIDED_STYLED = 16


@dataclass(frozen=True)
class Phase:
    """A part of the training, up to `end` of its steps: what its rows are, and about what.

    A part of the steps has rows of a `single` exchange each; the others, of whole conversations,
    of which a part is `broken_off`. The last two fields are those of Conversations.conversation.
    """

    end: float
    single: float
    shapes: tuple[tuple[int, int, float], ...]  # tokens a row, rows a batch, how often
    broken_off: float
    personal: float
    styled: float


EXCHANGES = Phase(
    end=math.inf,
    single=1.0,
    shapes=((28, 144, 0.4), (48, 84, 0.6)),
    broken_off=1.0,
    personal=0.2,
    styled=0.2,
)
# First to tell topics apart, the hardest thing: a question alone, and the first words of its reply.
# Among other questions it takes the model many times as long to learn the same. Then to find the
# question in a conversation. Then whole replies, memory, styles and follow-ups, at all positions;
# in the end more of the last three.
PHASES = (
    replace(EXCHANGES, end=0.38),
    Phase(
        end=0.51,
        single=0.0,
        shapes=((64, 64, 0.40), (128, 32, 0.40), (256, 16, 0.20)),
        broken_off=0.9,
        personal=0.4,
        styled=0.4,
    ),
    Phase(
        end=0.8,
        single=0.2,
        shapes=((64, 64, 0.20), (128, 32, 0.35), (256, 16, 0.35), (512, 8, 0.10)),
        broken_off=0.3,
        personal=0.5,
        styled=0.4,
    ),
    Phase(
        end=math.inf,
        single=0.15,
        shapes=((64, 64, 0.35), (128, 32, 0.40), (256, 16, 0.20), (512, 8, 0.05)),
        broken_off=0.3,
        personal=0.6,
        styled=0.45,
    ),
)


class Rows:
    """Rows of token ids, cut from conversations: step -> a batch, always the same one."""

    def __init__(
        self, conversations: Conversations, tokenizer: Tokenizer, *, seed: int, steps: int = 11800
    ):
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.seed = seed
        self.steps = steps
        self.pieces = Pieces(tokenizer)
        self.end = tokenizer.special_tokens["<|endoftext|>"]

    def batch(self, step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Rows of ids and of labels, -100 where the user or the system speaks."""
        random = Random(f"{self.seed} {step}")
        phase = next(phase for phase in PHASES if step < phase.end * self.steps)
        single = random.random() < phase.single
        if single:
            phase = EXCHANGES
        length, rows, _ = random.choices(phase.shapes, [share for *_, share in phase.shapes])[0]
        draw = self.exchange if single else self.row
        pairs = [draw(random, length, phase) for _ in range(rows)]
        return [ids for ids, _ in pairs], [labels for _, labels in pairs]

    def row(self, random: Random, length: int, phase: Phase) -> tuple[list[int], list[int]]:
        """The first `length` tokens of a conversation; only the replies are learned."""
        ids: list[int] = []
        labels: list[int] = []
        for more, learned in self._messages(random, phase):
            ids += more
            labels += learned
            if len(ids) >= length:
                break
        return ids[:length], labels[:length]

    def exchange(self, random: Random, length: int, phase: Phase) -> tuple[list[int], list[int]]:
        """A conversation up to its first reply, padded to `length`; no shorter shape would do."""
        least = max((shape[0] for shape in phase.shapes if shape[0] < length), default=0)
        while True:
            ids: list[int] = []
            labels: list[int] = []
            for more, learned in self._messages(random, phase):
                ids += more
                labels += learned
                if learned[-1] != IGNORED:
                    break
            if least < len(ids) <= length:
                missing = length - len(ids)
                return ids + [self.end] * missing, labels + [IGNORED] * missing

    def _messages(self, random: Random, phase: Phase) -> Iterator[tuple[list[int], list[int]]]:
        """Each message's ids and labels; in some conversations long replies are broken off."""
        broken_off, decided = random.random() < phase.broken_off, DECIDED
        for message in self.conversations.conversation(
            random, personal=phase.personal, styled=phase.styled
        ):
            role, content = message["role"], message["content"]
            first = self.tokenizer.special_tokens[f"<|{role}|>"]
            if role == "assistant":
                tokens = [*self.tokenizer.encode(content), self.end]
                if broken_off and len(tokens) > LONG:
                    tokens = tokens[:decided]
                yield [first, *tokens], [IGNORED, *tokens]
            else:
                tokens = [first, *self.pieces.encode(random, content), self.end]
                decided = DECIDED_STYLED if role == "system" else decided
                yield tokens, [IGNORED] * len(tokens)
