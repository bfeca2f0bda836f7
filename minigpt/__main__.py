"""The command line: python -m minigpt COMMAND …, the same flags as python -m hf_bridge."""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: 0 if it worked, 2 for what the user gave, 1 for a failure of the system."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Hands know both spellings of a flag, --top_p and --top-p.
    arguments = [
        a.replace("_", "-") if a.startswith("--") and "=" not in a else a for a in arguments
    ]
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    root = argparse.ArgumentParser(prog="python -m minigpt", description="GPT-2 from scratch.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="continue a text")
    _add_model(command)
    command.add_argument("--prompt", required=True, help="the text to continue")
    command.add_argument("--max-new-tokens", type=int, default=50, metavar="N")
    command.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="0: off")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: off")
    command.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0: off")
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="1: off"
    )
    command.add_argument("--seed", type=int, help="the same seed gives the same text")
    command.add_argument("--sliding-window", type=int, metavar="W", help="attend to W tokens only")
    command.add_argument("--attention-sinks", type=int, default=0, metavar="N")
    command.set_defaults(run=_generate)

    command = commands.add_parser("tokenize", help="show how a text is cut into tokens")
    _add_model(command)
    command.add_argument("text")
    command.set_defaults(run=_tokenize)
    return root


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="a directory, or a hub id such as gpt2")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _generate(options: argparse.Namespace) -> None:
    from minigpt.engine import Engine

    if not options.prompt:
        raise ValueError("--prompt must not be empty")
    engine = Engine.from_pretrained(
        options.model,
        sliding_window=options.sliding_window,
        attention_sinks=options.attention_sinks,
    )
    decoder = engine.stream_decoder()
    tokens = engine.stream(
        engine.encode(options.prompt),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for token in tokens:
        print(decoder.feed(token), end="", flush=True)
    print(decoder.flush())


def _tokenize(options: argparse.Namespace) -> None:
    from minigpt.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(options.model)
    ids = tokenizer.encode(options.text)
    for i in ids:
        print(f"{i:>7}  {tokenizer.decode([i])!r}")
    print(f"{len(ids)} tokens, {len(options.text)} characters")


if __name__ == "__main__":
    sys.exit(main())
