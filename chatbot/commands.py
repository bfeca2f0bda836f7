"""What begins with a slash: /help, /system, /set …

A command is a function (terminal, argument) -> None; COMMANDS gives it its name. Whatever a person
can get wrong is a ChatError, and changes nothing.

Proof: tests/test_terminal.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chatbot import settings, storage
from chatbot.engines import display_name
from chatbot.texts import ChatError

if TYPE_CHECKING:
    from chatbot.terminal import Terminal


def show_help(terminal: Terminal, argument: str) -> None:
    """List the commands."""
    for name in COMMANDS:
        terminal.note(f"help_{name}")
    terminal.note("help_more")


def system(terminal: Terminal, argument: str) -> None:
    """Show the system prompt, or replace it, or take it away with "off"."""
    conversation = terminal.conversation
    if argument:
        conversation.set_system("" if argument.lower() == "off" else argument)
    key = "system_is" if conversation.system else "system_none"
    terminal.note(key, text=conversation.system)


def change(terminal: Terminal, argument: str) -> None:
    """Show the settings, or change one."""
    conversation = terminal.conversation
    shown = settings.NAMES
    if argument:
        name, _, value = argument.replace("=", " ").partition(" ")
        name = name.strip("-").replace("-", "_")
        if name not in settings.NAMES:
            raise ChatError("unknown_setting", name=name, names=", ".join(settings.NAMES))
        shown = (name,)
        if value.strip():
            new = settings.parse(name, value.strip())
            conversation.settings = conversation.settings.set(name, new)
    for name in shown:
        value = getattr(conversation.settings, name)
        terminal.line(f"{name} {'off' if value is None else value}")


def seed(terminal: Terminal, argument: str) -> None:
    """Show the seed, fix it, or let it go."""
    change(terminal, f"seed {argument}")


def clear(terminal: Terminal, argument: str) -> None:
    """Begin anew, with the same system prompt."""
    terminal.conversation.restart(system=terminal.conversation.system)
    terminal.note("cleared")


def undo(terminal: Terminal, argument: str) -> None:
    """Take back the last turn."""
    terminal.note("undone", text=terminal.conversation.undo().user)


def regen(terminal: Terminal, argument: str) -> None:
    """Ask the last question again."""
    conversation = terminal.conversation
    last = conversation.turns[-1:]
    terminal.show(conversation.regenerate())
    if conversation.settings.repeatable and conversation.turns[-1:] == last:
        terminal.note("same_again")


def save(terminal: Terminal, argument: str) -> None:
    """Keep the conversation in a file."""
    path = _path("/save", argument)
    storage.save(terminal.conversation, path)
    terminal.note("saved", path=path)


def load(terminal: Terminal, argument: str) -> None:
    """Go on with a conversation from a file."""
    path = _path("/load", argument)
    terminal.note("loaded", turns=storage.load(terminal.conversation, path), path=path)


def export(terminal: Terminal, argument: str) -> None:
    """Write the conversation for people to read."""
    path = _path("/export", argument)
    model = display_name(terminal.conversation.engine.name)
    storage.export(terminal.conversation, path, terminal.language, model)
    terminal.note("saved", path=path)


def tokens(terminal: Terminal, argument: str) -> None:
    """Show how a text is cut."""
    if not argument:
        raise ChatError("wants", name="/tokens", what="TEXT")
    engine = terminal.conversation.engine
    ids = engine.encode(argument)
    terminal.line(" ".join(repr(engine.decode([i])) for i in ids), wrap=False)
    terminal.note("tokens", tokens=len(ids), characters=len(argument))


def context(terminal: Terminal, argument: str) -> None:
    """Show what each turn costs, and which turns the model still reads."""
    conversation = terminal.conversation
    prompt, *costs = conversation.costs()
    terminal.note("context_system", tokens=prompt)
    used = prompt
    for number, cost in enumerate(costs):
        read = number >= conversation.first
        used += cost if read else 0
        state = "" if read else terminal.say("context_left")
        terminal.note("context_turn", number=number + 1, tokens=cost, state=state)
    maximum = conversation.engine.context_length
    terminal.note("context_sum", used=used, maximum=maximum, room=conversation.room)


def stats(terminal: Terminal, argument: str) -> None:
    """Show the last reply's numbers, with their units."""
    reply = terminal.last
    if reply is None:
        terminal.note("no_stats")
        return
    terminal.note("stats_prompt", tokens=reply.prompt_tokens, reused=reply.reused)
    if reply.seconds_to_first and reply.prefill_speed:
        seconds, speed = f"{reply.seconds_to_first:.2f}", rate(reply.prefill_speed)
        terminal.note("stats_first", seconds=seconds, speed=speed)
    if reply.decode_speed:
        terminal.note("stats_reply", tokens=reply.new_tokens, speed=rate(reply.decode_speed))


def leave(terminal: Terminal, argument: str) -> None:
    """End the conversation."""
    raise EOFError


COMMANDS: dict[str, Callable[[Terminal, str], None]] = {
    "help": show_help,
    "system": system,
    "set": change,
    "seed": seed,
    "clear": clear,
    "undo": undo,
    "regen": regen,
    "save": save,
    "load": load,
    "export": export,
    "tokens": tokens,
    "context": context,
    "stats": stats,
    "exit": leave,
}


def run(terminal: Terminal, line: str) -> None:
    """Do what a line that begins with a slash says; ChatError for a command that there is not."""
    name, _, argument = line[1:].partition(" ")
    if name.lower() not in COMMANDS:
        raise ChatError("unknown_command", name=f"/{name}")
    COMMANDS[name.lower()](terminal, argument.strip())


def rate(speed: float) -> str:
    """Tokens per second, not more exactly than they are: 130, 0.4."""
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise ChatError("wants", name=command, what="FILE")
    return Path(os.path.expanduser(argument))  # Path.expanduser raises for an unknown ~user
