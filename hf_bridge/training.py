"""Beside steps 13 to 15: from files to a model that can be talked to, by the Trainer.

What is written is as in minigpt, and loads there. The report on chunk sizes is minigpt's alone.

Twin: minigpt/training.py.  Proof: tests/test_training.py.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers.trainer_utils import get_last_checkpoint

from hf_bridge import adapters, lora, metrics
from hf_bridge.batches import IGNORED, Batches, Causal, Example, seeded, split
from hf_bridge.config import GPTConfig
from hf_bridge.corpus import read_documents, read_pairs
from hf_bridge.data import Chunks, check_chunks, write_chunks
from hf_bridge.engine import Engine
from hf_bridge.generate import generate
from hf_bridge.model import GPT
from hf_bridge.optimize import Record
from hf_bridge.options import check_options, run_config, write_options
from hf_bridge.runs import BEST
from hf_bridge.tokenizer import Tokenizer
from hf_bridge.tokenizer import train as train_tokenizer
from hf_bridge.train import train

CHUNKS = "chunks.jsonl"
END = "<|endoftext|>"
FULL = "out of memory|can't allocate memory"
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 512},
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 512},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024},
}


def train_model(options: argparse.Namespace) -> None:
    """A text file becomes a model that can be talked to."""
    folder = Path(options.output)
    sizes = {**CONFIGS[options.config], "attn_pdrop": 0.0}
    sizes |= {"embd_pdrop": options.dropout, "resid_pdrop": options.dropout}
    GPTConfig(**sizes)  # if it cannot be, now
    check_chunks(options.chunk_size, options.overlap, sizes["n_positions"])
    resumed = check_options(options)
    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.is_main_process and resumed is None:
        write_options(options)
        _prepare(options)
    processes.wait_for_everyone()
    tokenizer = Tokenizer.from_pretrained(folder)
    eos = tokenizer.eos_token_id
    config = GPTConfig(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **sizes)
    model = GPT(config, generator=seeded(options.seed, "weights", 0)).to(_device())
    collate = Causal(tokenizer.eos_token_id or 0)
    best = _run(options, model, Chunks(folder / CHUNKS), collate, tokenizer, GPT.save_pretrained)
    if processes.is_main_process:
        GPT.from_pretrained(folder / BEST).save_pretrained(folder)
        _say(f"wrote {folder}, perplexity {best:,.4g}; python -m chatbot --model {folder}")


def finetune_model(options: argparse.Namespace) -> None:
    """A trained model learns examples: all of it, or LoRA's or an adapter's few parameters."""
    folder = Path(options.output)
    resumed = check_options(options)
    processes = PartialState(cpu=not torch.cuda.is_available())
    engine = Engine.from_pretrained(options.model, dtype=torch.float32, device=_device())
    model, tokenizer = engine.model, engine.tokenizer
    quantized = _is_quantized(model)
    if quantized and options.method != "lora":
        raise ValueError(
            f"--method {options.method} needs a float model, and {options.model} is quantized: "
            "use --method lora, or the float model"
        )
    context = model.config.n_positions
    length = min(128, context) if options.max_length is None else options.max_length
    if not 2 <= length <= context:
        raise ValueError(f"max_length must be in [2, {context}], up to the context, got {length}")
    rows, told = _examples(engine, options.data, length)
    with torch.device("meta"):  # in floats, whatever its codes count
        total = sum(p.numel() for p in GPT(model.config).parameters())
    save = _method(options, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total += trained if options.method != "full" else 0
    if processes.is_main_process:
        _say(f"training {trained:,} of {total:,} parameters ({trained / total:.2%})")
        _compare(options, model.config)
        if told:
            _say(told)
    collate = Causal(tokenizer.eos_token_id or 0, length)
    if processes.is_main_process and resumed is None:  # nothing is left of a run that was refused
        write_options(options)
    best = _run(options, model, rows, collate, tokenizer, save)
    if not processes.is_main_process:
        return
    if options.method == "full":
        GPT.from_pretrained(folder / BEST).save_pretrained(folder)
    elif options.method == "lora" and not quantized:
        plain = GPT.from_pretrained(options.model, dtype=torch.float32)
        lora.load(plain, folder / BEST)
        lora.merge(plain)
        plain.save_pretrained(folder)
    if quantized:
        _say(f"wrote {folder / BEST}, perplexity {best:,.4g}: merge it into the float model")
        _say(f"python -m chatbot --model {options.model} --adapter {folder / BEST}")
    elif options.method == "adapters":
        _say(f"wrote {folder / BEST}, perplexity {best:,.4g}: adapters to load onto the model")
        _say(f"python -m chatbot --model {options.model} --adapter {folder / BEST}")
    else:
        tokenizer.save_pretrained(folder)
        _say(f"wrote {folder}, perplexity {best:,.4g}; python -m chatbot --model {folder}")


def evaluate_model(options: argparse.Namespace) -> None:
    """Perplexity by a moving window over each document, and how varied its own texts are."""
    model = GPT.from_pretrained(options.model, dtype=torch.float32, device=_device())
    if options.adapter is not None:
        adapters.load_either(model, options.adapter, base_model=options.model)
    tokenizer = Tokenizer.from_pretrained(options.model)
    texts = ("".join(pieces) for pieces in read_documents(options.data))
    rows = (ids for text in texts if len(ids := tokenizer.encode(text)) > 1)
    if (first := next(rows, None)) is None:
        raise ValueError(f"{options.data} holds no text of two tokens or more to measure")
    how = {"max_length": options.max_length, "stride": options.stride}
    windows = (metrics.windows(model, torch.tensor([ids]), **how) for ids in chain([first], rows))
    with _memory():
        measured = metrics.evaluate(model, _bar(chain.from_iterable(windows)))
    for name, value in {**measured, **_variety(model, tokenizer, options.seed)}.items():
        print(f"{name:<12}{value:>12,.4f}" if name != "tokens" else f"{name:<12}{value:>12,}")


def _prepare(options: argparse.Namespace) -> None:
    """Tokenizer and chunks, once, into the run's directory."""
    folder = Path(options.output)
    if options.tokenizer is None:
        documents = read_documents(options.data, ascii_only=options.ascii_only)
        pieces = _bar(chain.from_iterable(documents), "tokenizer")
        tokenizer = train_tokenizer(pieces, vocab_size=options.vocab_size, special_tokens=[END])
    else:
        tokenizer = Tokenizer.from_pretrained(options.tokenizer)
    lengths = write_chunks(
        options.data,
        tokenizer,
        folder / CHUNKS,
        chunk_size=options.chunk_size,
        overlap=options.overlap,
        ascii_only=options.ascii_only,
    )
    tokenizer.save_pretrained(folder)
    _say(f"{sum(lengths):,} tokens in {len(lengths):,} documents, vocabulary {len(tokenizer):,}")


def _run(
    options: argparse.Namespace,
    model: GPT,
    rows: Sequence[Example],
    collate: Causal,
    tokenizer: Tokenizer,
    save: Callable[[GPT, Path], None],
) -> float:
    """Split the rows, train, and return the best perplexity."""
    learned, held = split(rows, options.validation_split)
    batches = Batches(learned, options.batch_size, collate, seed=options.seed)
    measured = list(DataLoader(held, batch_size=16, collate_fn=collate))

    def evaluate(model: GPT) -> Record:
        scores = metrics.evaluate(model, measured)
        return {
            "loss": scores["loss"],
            "perplexity": scores["perplexity"],
            **_variety(model, tokenizer, options.seed),
        }

    with _hint(Path(options.output)), _memory():
        records = train(
            model,
            batches,
            run_config(options, len(learned)),
            output_dir=options.output,
            evaluate=evaluate,
            save=save,
            resume_from_checkpoint=options.resume_from_checkpoint,
        )
    return min(r["eval_perplexity"] for r in records if "eval_perplexity" in r)


def _examples(engine: Engine, data: str, length: int) -> tuple[list[Example], str]:
    """The examples that teach something when cut at `length`, and a line on those that do not."""
    every = [_example(engine, *pair) for pair in _bar(read_pairs(data), "examples")]
    rows = [row for row in every if any(i != IGNORED for i in row["labels"][1:length])]
    cut, lost = sum(len(row["labels"]) > length for row in every), len(every) - len(rows)
    told = f"{cut:,} of {len(every):,} examples are cut at {length} tokens (--max-length)"
    if lost:
        told += f"; {lost:,} have nothing to learn before that and are left out"
    if not rows:
        raise ValueError(f"{data} has nothing to learn: {told}")
    return rows, told if cut or lost else ""


def _example(engine: Engine, prompt: str, completion: str) -> Example:
    """Ids, and labels where the model is to speak: a prompt is a turn of a chat, not learned."""
    tokenizer = engine.tokenizer
    before: list[int] = []
    if prompt:
        before = engine.render([{"role": "user", "content": prompt}])
        completion = completion if tokenizer.chat_template else f" {completion}"
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*tokenizer.encode(completion), *end]
    return {"input_ids": [*before, *ids], "labels": [IGNORED] * len(before) + ids}


def _method(options: argparse.Namespace, model: GPT) -> Callable[[GPT, Path], None]:
    """Choose what trains; return how it is saved."""
    generator = seeded(options.seed, "weights", 0)
    if options.method == "lora":
        lora.adapt(
            model,
            rank=options.rank,
            alpha=options.alpha,
            targets=options.targets,
            generator=generator,
        )
        return partial(lora.save, base_model=options.model)
    if options.method == "adapters":
        adapters.adapt(model, width=options.width, generator=generator)
        return partial(adapters.save, base_model=options.model)
    model.requires_grad_(True)
    return GPT.save_pretrained


def _compare(options: argparse.Namespace, config: GPTConfig) -> None:
    """How many parameters each method trains; the chosen one is marked."""
    how = {"rank": options.rank, "targets": options.targets, "width": options.width}
    _say("method                       trainable   of all")
    for row in adapters.parameter_table(config, **how):
        mark = "  <-" if row.method.lower() == options.method else ""
        part = row.trainable / row.total
        _say(f"{row.method:<24}{row.trainable:>14,}{part:>9.2%}{mark}")


def _is_quantized(model: GPT) -> bool:
    """Whether codes stand in for weights: then only corrections beside them can train."""
    return bool(getattr(model.hf, "is_quantized", False))


def _variety(model: GPT, tokenizer: Tokenizer, seed: int) -> Record:
    """distinct-1 and distinct-2 of four short texts that the model writes from nothing."""
    eos = tokenizer.eos_token_id
    start = torch.full((4, 1), eos or 0, device=model.device)
    new = min(64, model.config.n_positions - 1)
    generator = torch.Generator(model.device).manual_seed(seed)
    rows = generate(model, start, max_new_tokens=new, generator=generator, eos_token_id=eos)
    texts = [[i for i in row[1:] if i != eos] for row in rows.tolist()]
    return {"distinct_1": metrics.distinct(texts, 1), "distinct_2": metrics.distinct(texts, 2)}


@contextmanager
def _hint(folder: Path) -> Iterator[None]:
    """Say how to go on with a run that was interrupted, or that found the disk full."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        kept = get_last_checkpoint(str(folder))
        if PartialState().is_main_process and kept:
            _say(f"stopped; {kept} is kept: add --resume-from-checkpoint to go on from there")
        elif PartialState().is_main_process and isinstance(error, KeyboardInterrupt):
            _say("stopped before the first checkpoint: the same command begins anew")
        raise


@contextmanager
def _memory() -> Iterator[None]:
    """Turn torch's many ways to say that memory is full into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(FULL, str(error)):
            raise
        raise OSError(
            "memory is full: make --batch-size smaller (and --gradient-accumulation-steps larger), "
            "or the rows shorter (--chunk-size, --max-length)"
        ) from error


def _device() -> torch.device:
    """This process's GPU, if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _bar(things: Any, what: str = "windows") -> Any:
    from tqdm import tqdm

    return tqdm(things, desc=what, disable=None)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
