"""One reply: token ids -> text, as it comes.

    ids -> characters (never half of one) -> held back while it may begin a stop text -> shown

Proof: tests/test_conversation.py.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from chatbot.engines import Engine
from chatbot.settings import Settings


@dataclass
class Turn:
    """What the user said, and what came back so far."""

    user: str
    assistant: str = ""


class StopFilter:
    """Let text pass up to the first of some stop texts; hold back an end that may begin one.

    >>> stops = StopFilter(["\\nUser:"])
    >>> [stops.feed(text) for text in ("Hi", " you\\nU", "ni\\nUse", "r: I")], stops.found
    (['Hi', ' you', '\\nUni', ''], True)
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be shown now that `text` has come too."""
        text = self._held + text
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        shown = text[: len(text) - keep]
        self._held = text[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back and turned out to begin no stop text, at the end."""
        held, self._held = self._held, ""
        return held


class Reply:
    """A reply on its way: iterate for its text, a piece per token, sometimes an empty one.

    The text gathers in `turn` as it comes: whatever ends the reply, what came is kept. To leave
    early, `close()`: the model stops between two tokens. `end` then stays "interrupted"; else it
    is "stop" (the model had finished) or "length" (it was cut).

    prompt_tokens, of which `reused` were in the cache; new_tokens; the seconds to the first of
    them, and for all that followed.
    """

    def __init__(
        self, engine: Engine, ids: Sequence[int], settings: Settings, turn: Turn, *, left: int = 0
    ):
        self.turn = turn
        self.left = left  # turns that no longer fitted the context
        self.end = "interrupted"
        self.prompt_tokens = len(ids)
        self.new_tokens = 0
        self.limit = min(settings.max_new_tokens, engine.context_length - len(ids))
        self.seconds_to_first: float | None = None
        self.seconds_decoding = 0.0
        self.reused = 0
        self._engine = engine
        self._asked = time.perf_counter()
        tokens = engine.stream(ids, **{**asdict(settings), "max_new_tokens": self.limit})
        # The protocol promises an iterator that can be closed.
        self._tokens = cast("Generator[int, None, None]", tokens)
        self._pieces = self._text()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Stop the model; what came is kept."""
        self._pieces.close()
        self._tokens.close()

    @property
    def prefill_speed(self) -> float | None:
        """Prompt tokens computed per second, None before the first token."""
        computed = self.prompt_tokens - self.reused
        return computed / self.seconds_to_first if self.seconds_to_first else None

    @property
    def decode_speed(self) -> float | None:
        """New tokens per second after the first, None where there is only one."""
        return (self.new_tokens - 1) / self.seconds_decoding if self.seconds_decoding else None

    @property
    def filled(self) -> bool:
        """Whether prompt and reply take up the whole context."""
        return self.prompt_tokens + self.new_tokens >= self._engine.context_length

    def _text(self) -> Generator[str, None, None]:
        decoder = self._engine.stream_decoder()
        stops = StopFilter(self._engine.stop)
        try:
            for token in self._timed():
                yield self._keep(stops.feed(decoder.feed(token)))
                if stops.found:
                    self.end = "stop"
                    return
            rest = stops.feed(decoder.flush())
            yield self._keep(rest + stops.flush())
            self.end = "length" if self.new_tokens == self.limit else "stop"
        finally:
            self._tokens.close()

    def _timed(self) -> Iterator[int]:
        """The tokens, with the time spent on them but not on whoever reads them."""
        started = self._asked
        for token in self._tokens:
            seconds = time.perf_counter() - started
            if self.seconds_to_first is None:
                self.seconds_to_first, self.reused = seconds, self._engine.reused
            else:
                self.seconds_decoding += seconds
            self.new_tokens += 1
            yield token
            started = time.perf_counter()

    def _keep(self, text: str) -> str:
        # After "Assistant:" a model begins with a space, which belongs to the format.
        text = text if self.turn.assistant else text.lstrip()
        self.turn.assistant += text
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text could begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
