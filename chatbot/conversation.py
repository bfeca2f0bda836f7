"""What is said, and which part of it the model still reads.

    context  =  system prompt  +  the latest whole turns  +  the new message  +  room for the reply

When it grows too long, the oldest turns leave, whole; the system prompt stays. Nothing is
forgotten here: a file of the conversation holds all of it.

Proof: tests/test_conversation.py.
"""

from bisect import bisect_left
from collections.abc import Sequence

from chatbot.engines import Engine, Message
from chatbot.reply import Reply, Turn
from chatbot.settings import Settings
from chatbot.texts import ChatError


class Conversation:
    """One person's conversation with one model; several may share an engine.

    `turns` holds all of them; the model reads those from `first` on. A turn without a reply (it
    failed, or was stopped at once) is not shown to the model.
    """

    def __init__(self, engine: Engine, settings: Settings, *, system: str = ""):
        self.engine = engine
        self.settings = settings
        self.restart(system=system)

    @property
    def room(self) -> int:
        """Tokens of the context that are kept free for a reply."""
        return min(self.settings.max_new_tokens, self.engine.context_length // 4)

    def restart(self, *, system: str, turns: Sequence[Turn] = ()) -> None:
        """Begin anew, or with another's turns; ChatError if the system prompt is too long."""
        self.set_system(system)
        self.turns = list(turns)
        self.first = 0

    def set_system(self, text: str) -> None:
        """Another system prompt for all that follows; an empty one is none."""
        text = check_text(text)
        if text:
            needed = len(self.engine.encode(text))
            whole = len(self.engine.render([*_messages(text, []), _user("")]))
            limit = self.engine.context_length - self.room - 1  # one token for a message, at least
            if whole > limit:
                available = max(limit - (whole - needed), 0)
                raise ChatError("system_too_long", needed=needed, available=available)
        self.system = text

    def messages(self, first: int | None = None) -> list[Message]:
        """What the model reads of the past: the system prompt, and the turns from `first` on."""
        return _messages(self.system, self.turns[self.first if first is None else first :])

    def reply(self, text: str) -> Reply:
        """Say something; the reply comes as it is iterated.

        Raises ChatError, and leaves all as it was, for an empty message, for one that is no
        Unicode, and for one that is too long even without any history.
        """
        text = check_text(text)
        if not text:
            raise ChatError("empty_message")
        ids, first = self.fit(text)
        turn = Turn(text)
        reply = Reply(self.engine, ids, self.settings, turn, left=first - self.first)
        self.first = first
        self.turns.append(turn)
        return reply

    def regenerate(self) -> Reply:
        """Another reply to the last message, in place of the one that it got."""
        last = self.undo()
        try:
            return self.reply(last.user)
        except BaseException:
            self.turns.append(last)
            raise

    def undo(self) -> Turn:
        """Take back the last turn; ChatError if there is none."""
        if not self.turns:
            raise ChatError("no_turn")
        turn = self.turns.pop()
        self.first = min(self.first, len(self.turns))
        return turn

    def fit(self, text: str) -> tuple[list[int], int]:
        """The prompt's ids and its first turn: as many late turns as leave room for a reply.

        A turn that has left does not come back, so that the prompt keeps its beginning, and the
        cache its use.
        """
        limit = self.engine.context_length - self.room

        def prompt(first: int) -> list[int]:
            return self.engine.render([*self.messages(first), _user(text)])

        ids = prompt(self.first)
        if len(ids) <= limit:  # as almost always
            return ids, self.first
        alone = prompt(len(self.turns))
        if len(alone) > limit:
            needed = len(self.engine.encode(text))
            available = max(limit - (len(alone) - needed), 0)
            raise ChatError("message_too_long", needed=needed, available=available)
        firsts = range(len(self.turns))  # the later, the shorter is the prompt
        first = bisect_left(firsts, True, lo=self.first, key=lambda i: len(prompt(i)) <= limit)
        return prompt(first), first

    def costs(self) -> list[int]:
        """Tokens of the system prompt, then of each turn, as the chat template writes them."""

        def length(system: str, *turns: Turn) -> int:
            return len(self.engine.render([*_messages(system, turns), _user("")]))

        alone = length(self.system)
        return [alone - length(""), *(length(self.system, turn) - alone for turn in self.turns)]


def check_text(text: str) -> str:
    """The text without blanks around it; ChatError for a lone surrogate, as broken input gives."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError("not_unicode", place=error.start) from error
    return text.strip()


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _messages(system: str, turns: Sequence[Turn]) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if turn.assistant:
            messages += [_user(turn.user), {"role": "assistant", "content": turn.assistant}]
    return messages
