"""Beside steps 10 and 13 to 15: the flags of quantize, train, finetune and eval, as minigpt's.

Twin: minigpt/commands.py.  Proof: tests/test_training.py.
"""

import argparse
from typing import Any


def add_training(commands: Any) -> None:
    """Register the three commands with argparse's subparsers."""
    command = commands.add_parser("train", help="train a model from scratch on texts")
    _add_run(command, learning_rate=1e-3, epochs=10)
    command.add_argument(
        "--config", choices=("tiny", "small", "gpt2"), default="tiny", help="how large (tiny)"
    )
    command.add_argument("--tokenizer", metavar="DIR", help="of a model; default: learn one")
    command.add_argument(
        "--vocab-size", type=int, default=2048, metavar="N", help="of the learned tokenizer"
    )
    command.add_argument(
        "--chunk-size", type=int, default=256, metavar="N", help="tokens a row (256)"
    )
    command.add_argument(
        "--overlap", type=int, default=0, metavar="N", help="tokens that two rows share (0)"
    )
    command.add_argument("--ascii-only", action="store_true", help="drop what is not ASCII")
    command.add_argument(
        "--dropout", type=float, default=0.0, metavar="X", help="beside attention (0)"
    )
    command.set_defaults(run=_train)

    command = commands.add_parser("finetune", help="train a model further on examples")
    command.add_argument("--model", required=True, help="a directory, or a hub id such as gpt2")
    _add_run(command, learning_rate=2e-4, epochs=3)
    command.add_argument("--method", choices=("full", "lora", "adapters"), default="lora")
    command.add_argument(
        "--max-length", type=int, metavar="N", help="tokens an example (128, or the context)"
    )
    command.add_argument("--rank", type=int, default=8, metavar="R", help="of LoRA (8)")
    command.add_argument("--alpha", type=float, default=16, metavar="X", help="of LoRA (16)")
    command.add_argument("--targets", nargs="+", default=["c_attn"], help="of LoRA (c_attn)")
    command.add_argument(
        "--width", type=int, default=64, metavar="N", help="of the bottleneck (64)"
    )
    command.set_defaults(run=_finetune)

    command = commands.add_parser("eval", help="measure a model on texts")
    command.add_argument("--model", required=True, help="a directory, or a hub id such as gpt2")
    command.add_argument("--data", required=True, help="a text file, a .jsonl, or a directory")
    command.add_argument("--adapter", metavar="DIR", help="LoRA or adapters, to load onto it")
    command.add_argument("--max-length", type=int, help="of the window (the context)")
    command.add_argument("--stride", type=int, help="of the window (half of it)")
    command.add_argument("--seed", type=int, default=0, help="of the texts it writes")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=_eval)


def add_quantize(command: argparse.ArgumentParser) -> None:
    """The flags of quantize, beside --model."""
    command.add_argument("--bits", type=int, choices=(4, 8), required=True, help="a weight")
    command.add_argument("--quant-type", choices=("nf4", "fp4"), help="of 4 bits (nf4)")
    command.add_argument("--double-quant", action="store_true", help="4 bits: the scales in 8 bits")
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights before, and of what stays floats (the file's)",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the directory to write")


def _add_run(command: argparse.ArgumentParser, *, learning_rate: float, epochs: int) -> None:
    """The flags that train and finetune share, spelled as in transformers' TrainingArguments."""
    flag = command.add_argument
    flag("--data", required=True, metavar="PATH", help="a text file, a .jsonl, or a directory")
    flag("--output", required=True, metavar="DIR", help="the directory to write")
    for name, default, meaning in (
        ("--num-train-epochs", float(epochs), "readings of the data"),
        ("--max-steps", 0, "updates; 0: as many as the epochs need"),
        ("--batch-size", 16, "rows a batch, all processes together"),
        ("--gradient-accumulation-steps", 1, "batches an update"),
        ("--learning-rate", learning_rate, "at its highest"),
        ("--warmup-ratio", 0.05, "part of the steps in which the rate rises"),
        ("--weight-decay", 0.1, "of matrices"),
        ("--max-grad-norm", 1.0, "0: no clipping"),
        ("--eval-steps", 0, "updates between evaluations; 0: an epoch"),
        ("--save-steps", 0, "updates between checkpoints; 0: as --eval-steps"),
        ("--early-stopping-patience", 0, "evaluations without a better one; 0: never"),
        ("--validation-split", 0.05, "part of the rows that is not learned"),
        ("--seed", 0, "the same seed gives the same model"),
    ):
        kind = type(default)
        sign = "N" if kind is int else "X"
        flag(name, type=kind, default=default, metavar=sign, help=f"{meaning} ({default})")
    optimizers = ("adamw", "muon")
    flag("--optim", choices=optimizers, default="adamw", help="muon: for matrices (adamw)")
    flag("--bf16", action="store_true", help="compute in bfloat16, where the machine is fast at it")
    flag("--resume-from-checkpoint", action="store_true", help="go on where a run was killed")
    flag("--debug", action="store_true", help="show the traceback of an error")


def _train(options: argparse.Namespace) -> None:
    from hf_bridge import training

    training.train_model(options)


def _finetune(options: argparse.Namespace) -> None:
    from hf_bridge import training

    training.finetune_model(options)


def _eval(options: argparse.Namespace) -> None:
    from hf_bridge import training

    training.evaluate_model(options)
