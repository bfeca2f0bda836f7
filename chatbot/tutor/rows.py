"""Rows of tokens to learn from: what they hold and how long they are, from step to step.

    conversations -> a row of ids, and of labels: -100 where the user or the system speaks,
    or the tutor says what it should not learn to say

A reply is decided in its first tokens; the others follow from these and from the weights. So long
replies are broken off, at first all of them, and more questions are seen for the same work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from chatbot.tutor.corpus import Conversations, Message
from chatbot.tutor.pieces import Pieces
from minigpt import Tokenizer
from minigpt.batches import IGNORED

STEPS = 4800  # of the whole training, of about 4,096 tokens each
STEPS_AGAIN = 3000  # of one that goes on from a tutor
LONG = 28  # tokens; a longer reply may be broken off: hardly any that says a fact again is longer
DECIDED = 8  # tokens, after which only one reply is left to a question alone
DECIDED_LATER = 16  # the same in a conversation, and after a style's first words
MISHEARD = 0.4  # of what the user tells in a conversation; its reply is wrong and not learned

Shapes = tuple[tuple[int, int, float], ...]  # tokens a row, rows a batch, how often
# A question alone: a short one, a longer one, and one after a system prompt.
EXCHANGES: Shapes = ((28, 144, 0.4), (48, 84, 0.4), (76, 53, 0.2))


@dataclass(frozen=True)
class Phase:
    """A part of the training, up to `end` of its steps: what its rows are, and about what.

    A part of the steps has rows of a `single` exchange each; the others, of conversations in these
    `shapes`, of which a part is `broken_off`. `personal`, `styled` and `topics` are those of
    Conversations.conversation. `of_exchanges` times the exchanges are drawn that a step learns, and
    `of_rows` times the rows of conversations: it learns the hardest.
    """

    end: float
    single: float
    shapes: Shapes
    broken_off: float
    personal: float
    styled: float
    topics: float = 1.0
    of_exchanges: int = 1
    of_rows: int = 1


# First to tell topics apart, the hardest thing: a question alone, and the first words of its reply.
# Among other questions it takes the model many times as long to learn the same. Beside it short
# conversations, since copying a name is learned while the rate is high or hardly at all. Then to
# find the question in a conversation; then whole replies, at all positions, and of many rows the
# hardest: before most rows are easy, that costs more than it brings.
FIRST = Phase(
    end=0.15,
    single=0.65,
    shapes=((64, 64, 1.0),),
    broken_off=1.0,
    personal=0.5,
    styled=0.1,
    topics=10.0,
)
PHASES = (
    FIRST,
    replace(FIRST, end=0.4, single=0.85),
    Phase(
        end=0.55,
        single=0.35,
        shapes=((64, 64, 0.40), (128, 32, 0.40), (256, 16, 0.20)),
        broken_off=0.9,
        personal=0.45,
        styled=0.4,
        topics=5.0,
    ),
    Phase(
        end=0.8,
        single=0.35,
        shapes=((64, 64, 0.20), (128, 32, 0.35), (256, 16, 0.35), (512, 8, 0.10)),
        broken_off=0.3,
        personal=0.45,
        styled=0.5,
        topics=4.0,
        of_exchanges=4,
        of_rows=2,
    ),
    Phase(
        end=math.inf,
        single=0.3,
        shapes=((64, 64, 0.15), (128, 32, 0.50), (256, 16, 0.30), (512, 8, 0.05)),
        broken_off=0.2,
        personal=0.5,
        styled=0.5,
        topics=3.0,
        of_exchanges=4,
        of_rows=2,
    ),
)
# A model that can talk goes on from here: first mostly questions alone, of which a step holds the
# most, then as many conversations, in the end whole replies, which the others forget.
AGAIN = (
    Phase(
        end=0.4,
        single=0.75,
        shapes=((64, 64, 0.40), (128, 32, 0.45), (256, 16, 0.15)),
        broken_off=0.7,
        personal=0.8,
        styled=0.4,
        of_exchanges=4,
        of_rows=2,
    ),
    Phase(
        end=0.8,
        single=0.5,
        shapes=((64, 64, 0.30), (128, 32, 0.45), (256, 16, 0.20), (512, 8, 0.05)),
        broken_off=0.3,
        personal=0.65,
        styled=0.5,
        of_exchanges=4,
        of_rows=2,
    ),
    Phase(
        end=math.inf,
        single=0.3,
        shapes=((64, 64, 0.15), (128, 32, 0.50), (256, 16, 0.30), (512, 8, 0.05)),
        broken_off=0.15,
        personal=0.5,
        styled=0.55,
        of_exchanges=4,
        of_rows=2,
    ),
)


class Rows:
    """Rows of token ids, cut from conversations: step -> a batch, always the same one."""

    def __init__(
        self,
        conversations: Conversations,
        tokenizer: Tokenizer,
        *,
        seed: int,
        steps: int = STEPS,
        phases: Sequence[Phase] = PHASES,
    ):
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.seed = seed
        self.steps = steps
        self.phases = phases
        self.pieces = Pieces(tokenizer)
        self.end = tokenizer.special_tokens["<|endoftext|>"]

    def batch(self, step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Rows of ids and of labels, -100 where nothing is to be learned."""
        ids, labels, rows = self.candidates(step)
        return ids[:rows], labels[:rows]

    def candidates(self, step: int) -> tuple[list[list[int]], list[list[int]], int]:
        """As many rows as the step draws, ids and labels, and how many of them it learns."""
        random = Random(f"{self.seed} {step}")
        phase = next(phase for phase in self.phases if step < phase.end * self.steps)
        single = random.random() < phase.single
        shapes = EXCHANGES if single else phase.shapes
        length, rows, _ = random.choices(shapes, [share for *_, share in shapes])[0]
        pairs = [
            self.exchange(random, length, phase) if single else self.row(random, length, phase)
            for _ in range(rows * (phase.of_exchanges if single else phase.of_rows))
        ]
        return [ids for ids, _ in pairs], [labels for _, labels in pairs], rows

    def row(self, random: Random, length: int, phase: Phase) -> tuple[list[int], list[int]]:
        """The first `length` tokens of a conversation; only right replies are learned."""
        decided = DECIDED_LATER if random.random() < phase.broken_off else None
        messages = self.conversations.conversation(
            random,
            personal=phase.personal,
            styled=phase.styled,
            topics=phase.topics,
            misheard=MISHEARD,
        )
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            more, learned = self._encode(random, next(messages), decided)
            ids += more
            labels += learned
        return ids[:length], labels[:length]

    def exchange(self, random: Random, length: int, phase: Phase) -> tuple[list[int], list[int]]:
        """A conversation up to its first reply, padded to `length`; no shorter shape would do."""
        least = max((shape[0] for shape in EXCHANGES if shape[0] < length), default=0)
        while True:
            ids: list[int] = []
            labels: list[int] = []
            decided = DECIDED
            for message in self.conversations.conversation(
                random, personal=phase.personal, styled=0.3, topics=phase.topics
            ):
                decided = DECIDED_LATER if message["role"] == "system" else decided
                more, learned = self._encode(random, message, decided)
                ids += more
                labels += learned
                if message["role"] == "assistant":
                    break
            if least < len(ids) <= length:
                missing = length - len(ids)
                return ids + [self.end] * missing, labels + [IGNORED] * missing

    def _encode(
        self, random: Random, message: Message, decided: int | None
    ) -> tuple[list[int], list[int]]:
        """A message's ids and labels; a long reply is broken off after `decided` tokens."""
        role, content = message["role"], message["content"]
        first = self.tokenizer.special_tokens[f"<|{role}|>"]
        if role == "assistant":
            tokens = [*self.tokenizer.encode(content), self.end]
            if len(tokens) > LONG:
                tokens = tokens[:decided]
            learned = tokens if message["learned"] else [IGNORED] * len(tokens)
            return [first, *tokens], [IGNORED, *learned]
        tokens = [first, *self.pieces.encode(random, content), self.end]
        return tokens, [IGNORED] * len(tokens)
