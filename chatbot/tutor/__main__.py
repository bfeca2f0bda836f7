"""`make tutor`: learn the tokenizer and the model from the dialogues, and write both.

The same seed and steps give the same model on the same machine. Two cores need a bit more than an
hour; a run that broke off goes on where it was when it is called again.
"""

import argparse
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from chatbot.tutor import corpus
from chatbot.tutor.embeddings import learn_embeddings
from chatbot.tutor.grow import grow
from chatbot.tutor.hardest import hardest
from chatbot.tutor.rows import AGAIN, PHASES, STEPS, STEPS_AGAIN, Rows
from chatbot.tutor.start import head_size, start_copying, start_embeddings
from minigpt import GPT, GPTConfig, Tokenizer
from minigpt.files import write_json
from minigpt.options import OPTIONS
from minigpt.quant_linear import Quantized
from minigpt.runs import check_folder, compare, find_checkpoint, read_settings
from minigpt.tokenizer import train as train_tokenizer
from minigpt.train import Batch, Record, TrainConfig, count_tokens, summed_loss, train

FOLDER = Path(__file__).parent
VOCAB_SIZE = 4096
CONTEXT = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the tutor: 0; 2 for what the user gave, 1 for a failed system, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        make(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, ArithmeticError, OSError) as error:
        if options.debug:
            raise
        print(f"tutor: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def make(options: argparse.Namespace) -> None:
    """Train from start to end, or from where a run broke off, and write the model directory.

    Raises ValueError for flags or dialogues that are wrong, OSError if the disk is full.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no such GPU here, use cpu")
    again = options.start is not None
    if options.steps is None:
        options.steps = STEPS_AGAIN if again else STEPS
    if not again and options.layers is not None and options.layers < 2:
        raise ValueError("--layers must be at least 2: the heads that copy are in two layers")
    if options.output.is_file():
        raise ValueError(f"--output {options.output} is a file: give a directory")
    config = training_config(options)
    broken_off = begun(options)
    dialogues = corpus.read()
    if again:
        model, tokenizer = read_tutor(options.start, options.layers)
    else:
        model, tokenizer = new_tutor(dialogues, options)
        if broken_off is None:
            start_weights(model, tokenizer, dialogues, options)
    model.to(options.device)
    conversations = corpus.Conversations(dialogues)
    phases = AGAIN if again else PHASES
    rows, others = (
        Rows(conversations, tokenizer, seed=seed, steps=options.steps, phases=phases)
        for seed in (options.seed, options.seed + 1)
    )
    if broken_off is None:
        options.runs.mkdir(parents=True, exist_ok=True)
        write_json(options.runs / OPTIONS, asked(options))
    else:
        print(f"going on from {broken_off} (delete {options.runs} to begin anew)", flush=True)
    history = train(
        model,
        lambda step: batch(model, rows, step),
        config,
        output_dir=options.runs,
        resume_from_checkpoint=broken_off is not None,
        evaluate=lambda model: evaluate(model, others),
    )
    save(model, tokenizer, options.output)
    draw_curve(history, options.output / "loss.png")
    tell_card(options.output / "README.md", options, model)
    if (done := find_checkpoint(options.runs)) is not None:
        shutil.rmtree(done)  # the next run is a new one
    print(f"wrote {options.output}")


def parser() -> argparse.ArgumentParser:
    """The flags; the card says how the weights in the repository differ from the defaults'."""
    flags = argparse.ArgumentParser(prog="python -m chatbot.tutor", description="Train the tutor.")
    steps = f"of about 4,096 tokens; default {STEPS}, or {STEPS_AGAIN} with --start"
    flags.add_argument("--steps", type=int, help=steps)
    flags.add_argument(
        "--start", metavar="TUTOR", help="go on from a tutor, after the dialogues grew"
    )
    flags.add_argument("--layers", type=int, help="of a new tutor, or to grow to")
    flags.add_argument("--seed", type=int, default=0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    flags.add_argument("--device", choices=("cpu", "cuda"), default=default)
    flags.add_argument("--output", type=Path, default=FOLDER, help="the model directory")
    flags.add_argument("--runs", type=Path, default=Path("runs/tutor"), help="log and best model")
    flags.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return flags


def begun(options: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises ValueError if --runs cannot be written to, or holds a run with other flags or dialogues.
    """
    broken_off = check_folder(options.runs, find_checkpoint(options.runs) is not None)
    if broken_off is not None:
        path = options.runs / OPTIONS
        compare(path, read_settings(path, broken_off), asked(options))
    return broken_off


def asked(options: argparse.Namespace) -> Record:
    """All that decides what a run does; who goes on with it must ask for the same."""
    size = sum(file.stat().st_size for file in corpus.FOLDER.rglob("*.txt"))
    return {**given(options), "bytes of dialogues": size}


def given(options: argparse.Namespace) -> Record:
    """The flags that decide what the weights become."""
    return {name: getattr(options, name) for name in ("start", "layers", "steps", "seed")}


def training_config(options: argparse.Namespace) -> TrainConfig:
    """How the loop trains; ValueError for steps or a seed that cannot be."""
    return TrainConfig(
        max_steps=options.steps,
        optim="muon",
        learning_rate=3e-3 if options.start is None else 6e-4,  # more undoes what is learned
        min_lr_rate=0.01,
        warmup_steps=min(200, options.steps // 10),
        weight_decay=0.1,
        eval_steps=250,
        save_steps=500,
        bf16=options.device != "cpu",  # a CPU without matrix units computes float32 faster
        seed=options.seed,
    )


def new_tutor(dialogues: corpus.Dialogues, options: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    """A model that has not learned yet, and a tokenizer of every line."""
    print(
        f"{len(dialogues.topics)} topics; learning a tokenizer of {VOCAB_SIZE} tokens", flush=True
    )
    tokenizer = train_tokenizer(
        corpus.texts(dialogues), vocab_size=VOCAB_SIZE, special_tokens=corpus.SPECIAL_TOKENS
    )
    tokenizer.chat_template = corpus.CHAT_TEMPLATE
    return new_model(tokenizer, options), tokenizer


def new_model(tokenizer: Tokenizer, options: argparse.Namespace) -> GPT:
    """256 wide, of 4 layers if not told otherwise: 4.3 M parameters."""
    config = GPTConfig(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=4 if options.layers is None else options.layers,
        n_head=4,
        embd_pdrop=0.0,  # a tutor that went on with 0.1, and more weight decay, understood less
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT(config, generator=torch.Generator().manual_seed(options.seed))


def start_weights(
    model: GPT, tokenizer: Tokenizer, dialogues: corpus.Dialogues, options: argparse.Namespace
) -> None:
    """Embeddings that tell topics apart, and heads that copy, instead of chance: see start.py."""
    width, steps = model.config.n_embd - head_size(model), min(1000, options.steps // 10)
    tokens = learn_embeddings(dialogues, tokenizer, width=width, steps=steps, seed=options.seed)
    start_embeddings(model, tokens)
    start_copying(model, torch.Generator().manual_seed(options.seed))


def read_tutor(name: str, layers: int | None) -> tuple[GPT, Tokenizer]:
    """A tutor's model, grown to so many layers, and its tokenizer; ValueError if it is no tutor."""
    tokenizer = Tokenizer.from_pretrained(name)
    model = GPT.from_pretrained(name, dtype=torch.float32)
    missing = [token for token in corpus.SPECIAL_TOKENS if token not in tokenizer.special_tokens]
    if any(isinstance(part, Quantized) for part in model.modules()):
        raise ValueError(f"--start {name} is quantized: give the tutor that it was made of")
    if missing or model.config.n_positions < CONTEXT:
        raise ValueError(
            f"--start {name}: a tutor has the special tokens {' '.join(corpus.SPECIAL_TOKENS)} "
            f"and a context of {CONTEXT} tokens; without --start a new one is made"
        )
    return model if layers is None else grow(model, layers), tokenizer


def batch(model: GPT, rows: Rows, step: int) -> Batch:
    """What a step learns, input_ids and labels, (B, T): the rows drawn for it, or the hardest."""
    ids, labels, kept = rows.candidates(step)
    return hardest(model, tensors(ids, labels), kept)


def tensors(ids: list[list[int]], labels: list[list[int]]) -> Batch:
    """Rows as a batch: input_ids and labels, (B, T)."""
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def evaluate(model: GPT, rows: Rows) -> Record:
    """Perplexity of the replies in 8 batches of other conversations (made of the same wordings)."""
    losses, tokens = 0.0, 0
    for step in range(rows.steps, rows.steps + 8):  # as at the end of the training
        part = tensors(*rows.batch(step))
        part = {name: tensor.to(model.device) for name, tensor in part.items()}
        losses += summed_loss(model, part).item()
        tokens += count_tokens(part)
    return {"loss": losses / tokens, "perplexity": math.exp(losses / tokens)}


def save(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model directory: float16 weights, tokenizer, and greedy replies by default."""
    model.eval().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    greedy = {"do_sample": False, "max_new_tokens": 120, "bos_token_id": eos, "eos_token_id": eos}
    write_json(folder / "generation_config.json", {**greedy, "pad_token_id": eos})


def tell_card(card: Path, options: argparse.Namespace, model: GPT) -> None:
    """Say in the model card, between its marks, what the weights are and where they are from.

    What went before a tutor that went on stands there already, and stays.
    """
    if not card.is_file():
        return
    flags = [f"--{name}={value}" for name, value in given(options).items() if value is not None]
    command = f"`python -m chatbot.tutor {shlex.join(flags)}`"
    text = card.read_text("utf-8")
    before, mark, rest = text.partition("<!-- weights -->\n")
    told, end, after = rest.partition("<!-- /weights -->")
    layers, millions = model.config.n_layer, sum(p.numel() for p in model.parameters()) / 1e6
    size = f"{layers} layers, {millions:.1f} million parameters"
    went_on = options.start is not None and Path(options.start).resolve() == card.parent.resolve()
    history = (
        f"{told}Then ({size}): {command}.\n"
        if went_on
        else f"**These weights** ({size}) are from one run of {command}.\n"
    )
    card.write_text(f"{before}{mark}{history}{end}{after}" if end else text, "utf-8")


def draw_curve(history: Sequence[Record], path: Path) -> None:
    """The loss over the steps, each step's and the evaluations', as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(
        [r["step"] for r in steps], [r["loss"] for r in steps], lw=0.5, alpha=0.5, label="batch"
    )
    axes.plot(
        [r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations], label="evaluation"
    )
    axes.set(xlabel="step", ylabel="loss per reply token (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
