"""The command line: python -m hf_bridge COMMAND …, the same flags as python -m minigpt."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_bridge.commands import add_quantize, add_training

if TYPE_CHECKING:
    from hf_bridge.engine import Engine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: 0 if it worked, 2 for what the user gave, 1 for a failure of the system."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is text
    options = parser().parse_args([*map(_dashed, arguments[:end]), *arguments[end:]])
    try:
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        if options.debug:
            raise
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    root = argparse.ArgumentParser(prog="python -m hf_bridge", description="GPT-2 by transformers.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("--adapter", metavar="DIR", help="LoRA or adapters, to load onto it")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    for flag, kind, default in (
        ("--max-new-tokens", int, 50),
        ("--temperature", float, 1.0),
        ("--top-k", int, 0),
        ("--top-p", float, 1.0),
        ("--min-p", float, 0.0),
        ("--repetition-penalty", float, 1.0),
        ("--seed", int, None),
        ("--sliding-window", int, None),
        ("--attention-sinks", int, 0),
    ):
        generate.add_argument(flag, type=kind, default=default, help=f"default: {default}")
    parts = 'auto, cpu, cuda, or by parts: \'{"": "cuda", "transformer.h.3": "cpu"}\''
    generate.add_argument("--device-map", metavar="MAP", help=parts)
    generate.add_argument("--attn-implementation", metavar="NAME", help="sdpa (default), eager, …")
    generate.set_defaults(run=_generate)
    tokenize = commands.add_parser("tokenize", help="show how a text is cut into tokens")
    tokenize.add_argument("text")
    tokenize.set_defaults(run=_tokenize)
    trace = commands.add_parser("trace", help="show every tensor of a forward")
    trace.add_argument("text")
    trace.add_argument("--attention", type=int, metavar="LAYER", help="draw this layer's heads")
    trace.add_argument("--output", metavar="FILE", help="the drawing (attention.png)")
    trace.add_argument("--sliding-window", type=int, metavar="W", help="attend to W tokens only")
    trace.add_argument("--attention-sinks", type=int, default=0, metavar="N")
    trace.set_defaults(run=_trace)
    quantize = commands.add_parser("quantize", help="write a model in 4 or 8 bits a weight")
    add_quantize(quantize)
    quantize.add_argument(
        "--device-map", metavar="MAP", help="where it is done: cpu (default) or cuda"
    )
    quantize.set_defaults(run=_quantize)
    for command in (generate, tokenize, trace, quantize):
        command.add_argument("--model", required=True, help="a directory, or a hub id such as gpt2")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_training(commands)
    return root


def _dashed(argument: str) -> str:
    """Hands know both spellings of a flag: --top_p and --top-p, --top_p=1 too."""
    name, equals, value = argument.partition("=")
    flag = name.startswith("--") and " " not in name
    return (name.replace("_", "-") if flag else name) + equals + value


def _generate(options: argparse.Namespace) -> None:
    from hf_bridge.engine import Engine

    if not options.prompt:
        raise ValueError("--prompt must not be empty")
    if options.device_map is None and options.attn_implementation is None:
        engine = Engine.from_pretrained(
            options.model,
            sliding_window=options.sliding_window,
            attention_sinks=options.attention_sinks,
            adapter=options.adapter,
        )
    else:
        engine = _placed(options)
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


def _placed(options: argparse.Namespace) -> "Engine":
    import torch

    from hf_bridge import Tokenizer, adapters, placement
    from hf_bridge.engine import Engine

    gpu = torch.cuda.is_available()
    model = placement.load(
        options.model,
        dtype=None if gpu else torch.float32,
        device_map=_device_map(options.device_map or ("cuda" if gpu else "cpu")),
        attn_implementation=options.attn_implementation or "sdpa",
        sliding_window=options.sliding_window,
        attention_sinks=options.attention_sinks,
    )
    if options.adapter is not None:
        adapters.load_either(model, options.adapter, base_model=options.model)
    return Engine(model, Tokenizer.from_pretrained(options.model), options.model)


def _device_map(text: str) -> str | dict[str, str]:
    """What --device-map says: a device's name, or JSON with a place for each part."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--device-map is not valid JSON: {error}") from error


def _tokenize(options: argparse.Namespace) -> None:
    from hf_bridge.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(options.model)
    ids = tokenizer.encode(options.text)
    for i in ids:
        print(f"{i:>7}  {tokenizer.decode([i])!r}")
    print(f"{len(ids)} tokens, {len(options.text)} characters")


def _trace(options: argparse.Namespace) -> None:
    import torch

    from hf_bridge import GPT, Tokenizer, picture
    from hf_bridge.trace import trace

    model = GPT.from_pretrained(
        options.model,
        dtype=torch.float32,
        sliding_window=options.sliding_window,
        attention_sinks=options.attention_sinks,
    )
    tokenizer = Tokenizer.from_pretrained(options.model)
    layer, layers = options.attention, model.config.n_layer
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"--attention must be a layer from 0 to {layers - 1}, got {layer}")
    if layer is None and options.output:
        raise ValueError("--output is the drawing's file: tell the layer too, --attention LAYER")
    ids = tokenizer.encode(options.text)
    seen = trace(model, torch.tensor([ids], dtype=torch.int64))
    print(picture.table(seen))
    if layer is not None:
        output = options.output or "attention.png"
        title = f"{Path(options.model).resolve().name}, layer {layer}: who looks at whom"
        pattern = seen[f"h.{layer}.attn.pattern"][0]  # (H, T, T)
        picture.draw(pattern, picture.labels(tokenizer, ids), output, title=title)
        print(f"wrote {output}", file=sys.stderr)


def _quantize(options: argparse.Namespace) -> None:
    import torch

    from hf_bridge import placement, quant
    from hf_bridge.files import copy_texts, resolve, weight_files

    source, output = resolve(options.model), Path(options.output)
    if not options.output or output.is_file():
        raise ValueError(f"--output must be a directory, got {options.output!r}")
    if (output / "config.json").exists():
        raise ValueError(
            f"--output must be another directory than --model or any other model's, {output} "
            "holds one: nothing is overwritten"
        )
    if options.bits == 8 and (options.double_quant or options.quant_type):
        raise ValueError("--quant-type and --double-quant are for --bits 4")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    place = options.device_map or "cpu"
    if place == "auto" or "{" in place:
        raise ValueError(f"--device-map must be cpu or cuda: all is quantized there, got {place!r}")
    model = placement.load(source, dtype=dtype, device_map=place)
    kind = "int8" if options.bits == 8 else options.quant_type or "nf4"
    quant.save(quant.quantize(model, kind, double_quant=options.double_quant), output)
    copy_texts(source, output)
    before, after = (sum(f.stat().st_size for f in weight_files(d)) for d in (source, output))
    print(f"{source}: {before / 1e6:.1f} MB")
    print(f"{output}: {after / 1e6:.1f} MB, {kind}, {100 * after / before:.0f} % of it")


if __name__ == "__main__":
    sys.exit(main())
