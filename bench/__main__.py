"""The command line: python -m bench parity|speed|memory|quality."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.environment import threads
from bench.report import Record, around, insert, markdown, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one comparison: 0 if it worked and passed, 2 for what the user gave, 1 for a failure."""
    options = parser().parse_args(arguments)
    try:
        _check_targets(options)  # before minutes of measuring
        record = options.run(options)
        print(markdown(record), flush=True)  # first of all: a full disk does not lose it
        if options.output:
            for path in write(record, options.command, options.output):
                print(f"wrote {path}", file=sys.stderr)
        if options.insert:
            insert(record, options.command, options.insert)
    except KeyboardInterrupt:
        return 130
    except (ValueError, ArithmeticError, OSError) as error:
        if options.debug:
            raise
        print(f"bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 1 if record.passed is False else 0


def parser() -> argparse.ArgumentParser:
    """The comparisons and their flags."""
    root = argparse.ArgumentParser(prog="python -m bench", description="Measure and compare.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("parity", help="every tensor of a forward against transformers")
    command.add_argument("--model", default="chatbot/tutor", help="a directory or a hub id")
    command.add_argument("--dtype", action="append", help="only this one (may be repeated)")
    command.set_defaults(run=_parity)

    command = commands.add_parser("speed", help="tokens per second against transformers")
    command.add_argument("--model", help="a directory or a hub id; default: random weights")
    command.add_argument("--config", type=Path, help="their shape: a config.json; default: GPT-2")
    command.add_argument("--new-tokens", type=_count, default=128, metavar="N")
    command.add_argument("--runs", type=_count, default=5, metavar="N")
    command.add_argument("--threads", type=_count, metavar="N", help="of torch; default: its own")
    command.set_defaults(run=_speed)

    command = commands.add_parser("memory", help="weights, caches, and whole processes")
    command.add_argument("--model", default="chatbot/tutor", help="a directory or a hub id")
    command.add_argument("--sliding-window", type=_count, default=128, metavar="W")
    command.set_defaults(run=_memory)

    command = commands.add_parser("quality", help="the tutor on wordings it never saw")
    command.add_argument("--model", default="chatbot/tutor", help="a directory or a hub id")
    command.add_argument("--engine", default="minigpt", choices=("minigpt", "hf"))
    command.add_argument("--group", action="append", help="only this one (may be repeated)")
    command.add_argument(
        "--limit", type=_count, metavar="N", help="only N cases of each group and language"
    )
    command.add_argument("--failures", action="store_true", help="show what went wrong")
    command.set_defaults(run=_quality)

    for command in commands.choices.values():
        command.add_argument("--output", type=Path, help="also write Markdown and JSON there")
        command.add_argument("--insert", type=Path, help="also put the table into this document")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return root


def _check_targets(options: argparse.Namespace) -> None:
    if options.output:
        for path in (options.output, *options.output.parents):
            if path.is_file():
                raise ValueError(f"{path} is a file: give a directory")
        options.output.mkdir(parents=True, exist_ok=True)
    if options.insert:
        around(options.command, options.insert)


def _parity(options: argparse.Namespace) -> Record:
    from bench import parity

    return parity.measure(options.model, dtypes=options.dtype or list(parity.TOLERANCES))


def _memory(options: argparse.Namespace) -> Record:
    from bench import memory

    return memory.measure(options.model, sliding_window=options.sliding_window)


def _speed(options: argparse.Namespace) -> Record:
    from bench import speed

    with threads(options.threads):
        return speed.measure(
            options.model, config=options.config, new_tokens=options.new_tokens, runs=options.runs
        )


def _quality(options: argparse.Namespace) -> Record:
    from bench import quality
    from chatbot.engines import open_engine
    from chatbot.tutor import corpus

    groups = list(dict.fromkeys(options.group or quality.GROUPS))
    quality.check_groups(groups)
    engine = open_engine(options.engine, options.model)
    judge = quality.Judge(corpus.read())
    with threads(1):  # for one token of so small a model, a second one waits more than it helps
        record, failures = quality.measure(engine, judge, groups, limit=options.limit)
    for line in failures if options.failures else []:
        print(line)
    return record


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
