"""python -m chatbot: talk with a model in the terminal, or ask it one thing with -p."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from chatbot.engines import (
    ENGINES,
    TUTOR,
    Engine,
    display_name,
    generation_config,
    open_engine,
)
from chatbot.settings import NAMES, RULES, Settings, from_generation_config, parse
from chatbot.texts import LANGUAGES, ChatError, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chat: 0; 2 for what the user gave, 1 for a failed system, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(list(map(_dashed, arguments)))
    language = options.lang or _system_language()
    try:
        return _chat(options, language)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read us has enough: `python -m chatbot -p … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ArithmeticError, OSError, ImportError) as error:
        if options.debug:
            raise
        text = error.text(language) if isinstance(error, ChatError) else str(error)
        print(f"chatbot: {text}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def parser() -> argparse.ArgumentParser:
    """The flags, spelled as in transformers' GenerationConfig."""
    flags = argparse.ArgumentParser(prog="python -m chatbot", description="Talk with a model.")
    flags.add_argument("-p", "--prompt", help="say this, print the reply, and leave")
    flags.add_argument(
        "--model", default=str(TUTOR), help="a directory or a hub id (default: the tutor)"
    )
    flags.add_argument("--adapter", metavar="DIR", help="LoRA or adapters, to load onto it")
    flags.add_argument("--engine", choices=ENGINES, default="minigpt", help="what runs the model")
    flags.add_argument("--system", default="", metavar="TEXT", help="a system prompt")
    for name, meaning in {
        "temperature": "0: always the likeliest token",
        "top_k": "keep the K likeliest tokens; 0: off",
        "top_p": "keep the likeliest tokens that reach P; 1: off",
        "min_p": "keep tokens at least P times as likely as the likeliest; 0: off",
        "repetition_penalty": "make tokens already seen less likely; 1: off",
        "max_new_tokens": "longest reply, in tokens",
        "seed": "the same seed gives the same reply",
        "sliding_window": "let each token see only the last W",
        "attention_sinks": "and the first N, with a window",
    }.items():
        flags.add_argument(_flag(name), metavar="X", help=meaning)
    flags.add_argument("--lang", choices=LANGUAGES, help="of this program, not of the model")
    flags.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return flags


def _chat(options: argparse.Namespace, language: str) -> int:
    given: dict[str, Any] = {
        name: parse(name, text) for name in RULES if (text := getattr(options, name)) is not None
    }
    if sys.stdout is None:  # closed
        raise ChatError("no_output")
    prompt = _prompt(options)
    if prompt is not None and not prompt.strip():
        raise ChatError("empty_message")
    if prompt is None:
        print(say(language, "loading", model=display_name(options.model)), flush=True)
    engine = open_engine(
        options.engine,
        options.model,
        sliding_window=given.get("sliding_window"),
        attention_sinks=given.get("attention_sinks", 0),
        adapter=options.adapter,
    )
    try:
        settings = from_generation_config(generation_config(options.model))
    except ChatError as error:
        path = f"{options.model}, generation_config.json"
        raise ChatError("file_failed", path=path, why=error.text(language)) from error
    for name in NAMES:
        if name in given:
            settings = settings.set(name, given[name])
    if prompt is not None:
        return _once(engine, settings, options.system, prompt, language)
    return _talk(engine, settings, options.system, language, options.engine)


def _once(engine: Engine, settings: Settings, system: str, prompt: str, language: str) -> int:
    from chatbot.conversation import Conversation
    from chatbot.wrap import printable

    reply = Conversation(engine, settings, system=system).reply(prompt)
    for piece in reply:
        print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print(flush=True)
    if reply.end == "length":
        key = "cut_context" if reply.filled else "cut_once"
        why = say(language, key, maximum=engine.context_length, tokens=reply.new_tokens)
        print(f"chatbot: {why}", file=sys.stderr)
    return 0


def _talk(engine: Engine, settings: Settings, system: str, language: str, engine_name: str) -> int:
    from chatbot.conversation import Conversation
    from chatbot.terminal import Terminal

    # Broken bytes reach us as lone surrogates, which the conversation refuses by name.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    return Terminal(Conversation(engine, settings, system=system), language).run(engine_name)


def _prompt(options: argparse.Namespace) -> str | None:
    """What to say at once: -p, or all of standard input unless that is a keyboard."""
    if options.prompt is not None:
        return options.prompt
    if sys.stdin is None:  # closed
        return ""
    if sys.stdin.isatty():
        return None
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ChatError("not_unicode", place=len(raw[: error.start].decode())) from error


def _system_language() -> str:
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    locale = next((name for name in names if name), "")
    return "es" if locale.lower().startswith("es") else "en"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(argument: str) -> str:
    """Hands know both spellings of a flag: --top_p and --top-p, --top_p=1 too."""
    name, equals, value = argument.partition("=")
    flag = name.startswith("--") and " " not in name
    return name.replace("_", "-") + equals + value if flag else argument


if __name__ == "__main__":
    sys.exit(main())
