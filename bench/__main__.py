"""The command line: python -m bench parity|speed|memory|quality."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import Record, insert, markdown, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one comparison: 0 if it worked and passed, 2 for what the user gave, 1 for a failure."""
    options = parser().parse_args(arguments)
    if options.command is None:
        parser().print_help()
        return 0
    try:
        record = options.run(options)
        for path in write(record, options.command, options.output) if options.output else []:
            print(f"wrote {path}", file=sys.stderr)
        if options.insert:
            insert(record, options.insert)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(markdown(record))
    return 1 if record.passed is False else 0


def parser() -> argparse.ArgumentParser:
    """The comparisons and their flags."""
    root = argparse.ArgumentParser(prog="python -m bench", description="Measure and compare.")
    commands = root.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser("parity", help="every tensor of a forward against transformers")
    command.add_argument("--model", default="chatbot/tutor", help="a directory or a hub id")
    command.add_argument("--dtype", action="append", help="only this one (may be repeated)")
    command.set_defaults(run=_parity)

    command = commands.add_parser("speed", help="tokens per second against transformers")
    command.add_argument("--model", help="a directory or a hub id; default: random weights")
    command.add_argument("--config", type=Path, help="their shape: a config.json; default: GPT-2")
    command.add_argument("--new-tokens", type=int, default=128, metavar="N")
    command.add_argument("--runs", type=int, default=5, metavar="N")
    command.add_argument("--threads", type=int, metavar="N", help="of torch; default: its own")
    command.set_defaults(run=_speed)

    command = commands.add_parser("memory", help="weights, caches, and whole processes")
    command.add_argument("--model", default="chatbot/tutor", help="a directory or a hub id")
    command.add_argument("--sliding-window", type=int, default=128, metavar="W")
    command.set_defaults(run=_memory)

    command = commands.add_parser("quality", help="the tutor on wordings it never saw")
    command.add_argument("--model", default="chatbot/tutor")
    command.add_argument("--engine", default="minigpt", choices=("minigpt", "hf"))
    command.add_argument("--group", action="append", help="only this one (may be repeated)")
    command.add_argument("--limit", type=int, metavar="N", help="only N cases of each group")
    command.add_argument("--failures", action="store_true", help="show what went wrong")
    command.set_defaults(run=_quality)

    for command in commands.choices.values():
        command.add_argument("--output", type=Path, help="also write Markdown and JSON there")
        command.add_argument("--insert", type=Path, help="also put the table into this document")
    return root


def _parity(options: argparse.Namespace) -> Record:
    from bench import parity

    dtypes = options.dtype or list(parity.TOLERANCES)
    unknown = set(dtypes) - set(parity.TOLERANCES)
    if unknown:
        raise ValueError(f"dtype must be one of {', '.join(parity.TOLERANCES)}, got {min(unknown)}")
    return parity.measure(options.model, dtypes=dtypes)


def _memory(options: argparse.Namespace) -> Record:
    from bench import memory

    return memory.measure(options.model, sliding_window=options.sliding_window)


def _speed(options: argparse.Namespace) -> Record:
    import torch

    from bench import speed

    if options.threads:
        torch.set_num_threads(options.threads)
    return speed.measure(
        options.model, config=options.config, new_tokens=options.new_tokens, runs=options.runs
    )


def _quality(options: argparse.Namespace) -> Record:
    from bench import quality
    from chatbot.engines import open_engine
    from chatbot.tutor import corpus

    unknown = set(options.group or []) - set(quality.GROUPS)
    if unknown:
        raise ValueError(f"group must be one of {', '.join(quality.GROUPS)}, got {unknown.pop()}")
    engine = open_engine(options.engine, options.model)
    judge = quality.Judge(corpus.read())
    groups = options.group or list(quality.GROUPS)
    record, failures = quality.measure(engine, judge, groups, limit=options.limit)
    for line in failures if options.failures else []:
        print(line)
    return record


if __name__ == "__main__":
    sys.exit(main())
