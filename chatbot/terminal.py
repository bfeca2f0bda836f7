"""The conversation on a terminal.

    read a message -> a command, or a reply, printed as it comes -> a line of numbers -> read …

Ctrl-C during a reply sets a mark, which is looked at between two tokens: the model is never cut off
in the middle of a step, so its cache stays sound, and what came is kept.

Proof: tests/test_terminal.py.
"""

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from chatbot import commands
from chatbot.conversation import Conversation
from chatbot.engines import display_name
from chatbot.reply import Reply
from chatbot.texts import ChatError, say
from chatbot.wrap import WordWrap, printable

PROMPT = "> "
QUOTES = '"""'


class Terminal:
    """One conversation between a keyboard and a screen."""

    def __init__(self, conversation: Conversation, language: str, *, out: TextIO | None = None):
        self.conversation = conversation
        self.language = language
        self.out = out or sys.stdout
        self.colored = self.out.isatty() and "NO_COLOR" not in os.environ
        self.last: Reply | None = None
        self._stop = False

    def run(self, engine_name: str) -> int:
        """Talk until the end of the input (0) or Ctrl-C at the prompt (130)."""
        with suppress(ImportError):
            import readline  # arrow keys and history, where the system has it

            if os.environ.get("TERM") != "dumb":  # such a one shows what is meant for terminals
                readline.parse_and_bind("set enable-bracketed-paste on")  # many lines, one message
        engine = self.conversation.engine
        model = display_name(engine.name)
        self.note("greeting", model=model, engine=engine_name, context=engine.context_length)
        self.note("greeting_small")
        self.note("greeting_help")
        interrupted = False
        while True:
            try:
                self.out.write("\n")
                text = self._read()
                interrupted = False
                self.answer(text)
            except ChatError as error:
                self.line(error.text(self.language))
            except (ValueError, ArithmeticError, RuntimeError) as error:
                self.line(str(error))  # of the model; what was said so far can still be saved
            except EOFError:
                self.note("bye")
                return 0
            except KeyboardInterrupt:
                # One that was meant for a reply, but came a moment late, must not end it all.
                self.out.write("\n")
                if interrupted:
                    return 130
                interrupted = True
                self.note("interrupt")

    def answer(self, text: str) -> None:
        """Do what a line says: a command, or a message to the model."""
        if text.startswith("/") and not text.startswith("//"):
            commands.run(self, text)
        elif text.strip():
            self.show(self.conversation.reply(text[1:] if text.startswith("//") else text))

    def show(self, reply: Reply) -> None:
        """Print a reply as it comes, then its numbers."""
        if reply.left:
            self.note("left_one" if reply.left == 1 else "left", left=reply.left)
        wrap = WordWrap(shutil.get_terminal_size().columns) if self.out.isatty() else None
        with self._catching_interrupts():
            for piece in reply:
                piece = printable(piece)
                self.out.write(wrap.feed(piece) if wrap else piece)
                self.out.flush()
                if self._stop:
                    reply.close()
                    break
        self.out.write(f"{wrap.flush() if wrap else ''}\n")
        self.last = reply
        if reply.end == "interrupted":
            self.note("stopped")
        elif reply.end == "length":
            maximum = self.conversation.engine.context_length
            key = "cut_context" if reply.filled else "cut"
            self.note(key, maximum=maximum, tokens=reply.new_tokens)
        elif not reply.turn.assistant:
            self.note("no_words")
        self.footer(reply)

    def footer(self, reply: Reply) -> None:
        """Seconds to the first token, tokens per second, and how full the context is."""
        used = reply.prompt_tokens + reply.new_tokens
        maximum = self.conversation.engine.context_length
        parts: list[str] = []
        if reply.seconds_to_first is not None:
            parts.append(self.say("footer_first", seconds=f"{reply.seconds_to_first:.2f}"))
        if reply.prefill_speed:
            parts.append(self.say("footer_prefill", speed=commands.rate(reply.prefill_speed)))
        if reply.decode_speed:
            parts.append(self.say("footer_decode", speed=commands.rate(reply.decode_speed)))
        context = self.say("footer_context", used=used, maximum=maximum)
        if reply.reused:
            context += ", " + self.say("footer_reused", reused=reply.reused)
        self.line(" · ".join([*parts, context]))

    def say(self, key: str, **values: object) -> str:
        """A sentence in the person's language."""
        return say(self.language, key, **values)

    def note(self, key: str, **values: object) -> None:
        """Print a sentence of ours, dimmed, to stand apart from the model's."""
        self.line(self.say(key, **values))

    def line(self, text: str, *, wrap: bool = True) -> None:
        """Print a line of ours; too long for the screen, it is broken between words."""
        text = printable(text)
        if wrap and self.out.isatty():
            width = shutil.get_terminal_size().columns
            fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
            text = "\n".join(map(fill, text.splitlines()))
        self.out.write(f"\x1b[2m{text}\x1b[0m\n" if self.colored else f"{text}\n")
        self.out.flush()

    def _read(self) -> str:
        """A message: one line, or several between triple quotes; Ctrl-D closes them too."""
        line = input(PROMPT)
        if not line.lstrip().startswith(QUOTES):
            return line
        lines = [line.lstrip().removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(input("… "))
            except EOFError:  # of the message, not of the conversation
                self.out.write("\n")
                break
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    @contextmanager
    def _catching_interrupts(self) -> Iterator[None]:
        """Let Ctrl-C set a mark instead of raising, while a reply is on its way."""

        def mark(number: int, frame: FrameType | None) -> None:
            self._stop = True

        self._stop = False
        before = signal.signal(signal.SIGINT, mark)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
