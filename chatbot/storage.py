"""A conversation as a file: JSON to go on with, Markdown to read.

Proof: tests/test_conversation.py.
"""

import json
import os
import tempfile
from pathlib import Path

from chatbot.conversation import Conversation
from chatbot.reply import Turn
from chatbot.texts import LANGUAGES, ChatError, say


def save(conversation: Conversation, path: Path) -> None:
    """Write system prompt and all turns, those that left the context too; whole or not at all.

    Raises ChatError for a file that is there already, unless it is a saved conversation.
    """
    if os.path.exists(path):
        try:
            _read(path)
        except ChatError as error:
            raise ChatError("not_replaced", path=path) from error
    turns = [{"user": turn.user, "assistant": turn.assistant} for turn in conversation.turns]
    content = {"model": conversation.engine.name, "system": conversation.system, "turns": turns}
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load(conversation: Conversation, path: Path) -> int:
    """Replace the conversation by a saved one and say how many turns it has.

    Raises ChatError, and changes nothing, for a file that is no saved conversation.
    """
    system, turns = _read(path)
    conversation.restart(system=system, turns=turns)
    return len(turns)


def _read(path: Path) -> tuple[str, list[Turn]]:
    """The system prompt and the turns of a saved conversation."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        system = content["system"]
        turns = [Turn(turn["user"], turn["assistant"]) for turn in content["turns"]]
        said = [text for turn in turns for text in (turn.user, turn.assistant)]
        for text in (system, *said):
            if not isinstance(text, str):
                raise TypeError("text expected")
            text.encode()  # a lone surrogate is none
    except OSError as error:
        raise ChatError("file_failed", path=path, why=error.strerror) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ChatError("not_a_conversation", path=path, why=error) from error
    return system, turns


def export(conversation: Conversation, path: Path, language: str, model: str) -> None:
    """Write the conversation as Markdown, for people.

    Raises ChatError for a file that is there already, unless it is an exported conversation.
    """
    if os.path.exists(path) and not _is_exported(path):
        raise ChatError("page_not_replaced", path=path)
    lines = [f"# {say(language, 'conversation', model=model)}", ""]
    if conversation.system:
        lines += [f"**{say(language, 'system')}**: {conversation.system}", ""]
    for turn in conversation.turns:
        lines += [f"**{say(language, 'you')}**: {turn.user}", ""]
        lines += [f"**{model}**: {turn.assistant}", ""]
    _write(path, "\n".join(lines))


def _is_exported(path: Path) -> bool:
    """Whether its first line is that of a page by `export`, in any language, of any model."""
    headings = tuple(f"# {say(language, 'conversation', model='')}" for language in LANGUAGES)
    try:
        with path.open(encoding="utf-8") as page:
            return page.readline().startswith(headings)
    except (OSError, UnicodeDecodeError):
        return False


def _write(path: Path, text: str) -> None:
    """Write beside the file, then rename, so that a full disk leaves the old one whole.

    Only the owner may read it: what somebody says to a chatbot is private.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ChatError("file_failed", path=path, why=error.strerror) from error
