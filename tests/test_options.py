"""What is asked of train, finetune and eval but cannot be: one line before anything long begins."""

import ast
import json
import resource
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import hf_bridge.__main__
import hf_bridge.training
import minigpt.__main__
import minigpt.train
import minigpt.training
from hf_bridge.trainer import ExactTrainer
from minigpt import GPT

WORDS = "el gato come pescado y la casa es blanca . the cat eats fish and the house is white ."
main = minigpt.__main__.main  # of the side that is tested
SMALL = ["--chunk-size", "16", "--vocab-size", "300", "--batch-size", "4", "--max-steps", "4"]


@pytest.fixture(autouse=True, scope="module", params=[minigpt, hf_bridge], ids=lambda m: m.__name__)
def side(request: pytest.FixtureRequest):
    """Each command by each side; a configuration that is quick to train, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
        ours, theirs = minigpt.training.CONFIGS, hf_bridge.training.CONFIGS
        patch.setitem(ours, "tiny", replace(ours["tiny"], **sizes))
        patch.setitem(theirs, "tiny", sizes)
        patch.setitem(globals(), "main", request.param.__main__.main)
        yield request.param
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2 kB of sentences."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(" ".join(Random(0).choices(WORDS.split(), k=400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path, side) -> Path:
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", "--data", text, "--output", folder, *SMALL) == 0
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Prompts and completions."""
    path = tmp_path / "pairs.jsonl"
    line = json.dumps({"prompt": "¿el gato?", "completion": "come pescado"})
    path.write_text(f"{line}\n" * 12, encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gradient-accumulation-steps", 0], "gradient_accumulation_steps must be at least 1"),
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
        (["--num-train-epochs", -1], "num_train_epochs must be a positive number, got -1.0"),
        (["--num-train-epochs", "nan"], "num_train_epochs must be a positive number, got nan"),
        (["--num-train-epochs", "inf"], "num_train_epochs must be a positive number, got inf"),
        (["--warmup-ratio", 2], "warmup_ratio must be in [0, 1], got 2.0"),
        (["--warmup-ratio", "nan"], "warmup_ratio must be in [0, 1], got nan"),
        (["--validation-split", 0], "the share to evaluate must be in (0, 1), got 0.0"),
        (["--learning-rate", "nan"], "learning_rate must be a positive number, got nan"),
        (["--max-steps", -3], "max_steps must be at least 1, got -3"),
        (["--max_steps=-3"], "max_steps must be at least 1, got -3"),
        (["--seed", 10**20], f"seed must be in [0, 2**32), got {10**20}"),
        (["--seed", -1], "seed must be in [0, 2**32), got -1"),
        (["--dropout", 1.5], "embd_pdrop must be in [0, 1), got 1.5"),
        (["--output", ""], "--output and --data must not be empty"),
        (["--data", ""], "--output and --data must not be empty"),
    ],
)
def test_numbers_that_make_no_run_are_refused_before_the_text_is_read(
    flags, message, text, tmp_path, capsys
):
    output = tmp_path / "out"
    assert run("train", "--data", text, "--output", output, *SMALL, *flags) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"train: {message}") and told.count("\n") == 1
    assert not output.exists()


def test_an_output_that_is_no_place_for_a_run_is_refused_and_spared(
    text, trained, tmp_path, capsys
):
    model = tmp_path / "model"
    GPT.from_pretrained(trained).save_pretrained(model)
    before = contents(tmp_path)
    for output, message in (
        (text, f"train: {text} is a file: give a directory to write"),
        (text / "below", f"train: {text} is a file: give a directory to write"),
        (model, f"train: {model} holds a model, which a run would replace: give another one"),
    ):
        assert run("train", "--data", text, "--output", output, *SMALL) == 2
        assert capsys.readouterr().err == message + "\n"
    assert run("train", "--data", text.parent, "--output", text.parent / "a" / "b", *SMALL) == 2
    assert "must lie outside of --data" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert [path.name for path in text.parent.iterdir()] == ["corpus.txt"]


def test_fine_tuning_onto_the_model_itself_is_refused(trained, pairs, tmp_path, capsys):
    model = tmp_path / "model"
    GPT.from_pretrained(trained).save_pretrained(model)
    before = contents(model)
    assert run("finetune", "--model", model, "--output", model, "--data", pairs) == 2
    assert "holds a model, which a run would replace" in capsys.readouterr().err
    assert contents(model) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--chunk-size", 8], "chunk_size is 16 there, 8 here"),
        (["--overlap", 2], "overlap is 0 there, 2 here"),
        (["--vocab-size", 310], "vocab_size is 300 there, 310 here"),
        (["--ascii-only"], "ascii_only is False there, True here"),
        (["--learning-rate", 0.5], "learning_rate is 0.001 there, 0.5 here"),
    ],
)
def test_a_run_goes_on_only_as_it_began(flags, message, trained, text, capsys):
    before = contents(trained)
    again = ["--output", trained, *SMALL, "--resume-from-checkpoint"]
    assert run("train", "--data", text, *again, *flags) == 2
    err = capsys.readouterr().err
    to_do = "give the same, or another directory"
    assert err.endswith(f"options.json is of another run: {message}; {to_do}\n")
    assert contents(trained) == before


def test_a_run_goes_on_only_with_its_text_wherever_that_lies(trained, text, tmp_path, capsys):
    again = ["--output", trained, *SMALL, "--resume-from-checkpoint"]
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    assert run("train", "--data", moved, *again) == 0
    capsys.readouterr()
    moved.write_bytes(text.read_bytes() + b" and more")
    assert run("train", "--data", moved, *again) == 2
    size = text.stat().st_size
    assert f"bytes of text is {size} there, {size + 9} here" in capsys.readouterr().err


def test_lora_goes_on_only_with_its_scale_and_its_base(trained, pairs, tmp_path, capsys):
    other = tmp_path / "other"
    GPT.from_pretrained(trained).save_pretrained(other)
    (other / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    flags = ["--data", pairs, "--output", tmp_path / "out", "--max-steps", 2, "--batch-size", 2]
    assert run("finetune", "--model", trained, *flags) == 0
    again = [*flags, "--resume-from-checkpoint"]
    capsys.readouterr()
    assert run("finetune", "--model", trained, *again, "--alpha", 32) == 2
    assert "alpha is 16 there, 32.0 here" in capsys.readouterr().err
    assert run("finetune", "--model", other, *again) == 2
    assert f"model is {trained} there, {other} here" in capsys.readouterr().err


def test_a_checkpoint_of_another_program_is_refused(trained, text, tmp_path, capsys):
    (tmp_path / "checkpoint-4").mkdir()
    again = ["--output", tmp_path, *SMALL, "--resume-from-checkpoint"]
    assert run("train", "--data", text, *again) == 2
    assert "options.json is missing: " in capsys.readouterr().err


@pytest.mark.parametrize("length", [-3, 0, 1, 65])
def test_an_examples_length_fits_the_context(length, trained, pairs, tmp_path, capsys):
    flags = ["--data", pairs, "--output", tmp_path / "out", "--max-length", length]
    assert run("finetune", "--model", trained, *flags) == 2
    message = f"finetune: max_length must be in [2, 64], up to the context, got {length}\n"
    assert capsys.readouterr().err == message


def test_examples_that_are_cut_are_told_and_those_without_a_label_left_out(
    trained, pairs, tmp_path, capsys
):
    long = json.dumps({"prompt": "el gato " * 60, "completion": "come"})
    with open(pairs, "a", encoding="utf-8") as file:
        file.write(f"{long}\n" * 3)
    flags = ["--data", pairs, "--output", tmp_path / "out", "--max-steps", 4, "--batch-size", 1]
    assert run("finetune", "--model", trained, *flags, "--num-train-epochs", 1) == 0
    told = "\n3 of 15 examples are cut at 64 tokens (--max-length); 3 have nothing to learn"
    assert told in capsys.readouterr().err
    pairs.write_text(f"{long}\n" * 3, encoding="utf-8")
    flags[3] = tmp_path / "nothing"
    assert run("finetune", "--model", trained, *flags) == 2
    assert f"finetune: {pairs} has nothing to learn: 3 of 3" in capsys.readouterr().err


def test_weights_that_grow_past_all_numbers_stop_at_the_evaluation(text, tmp_path, capsys):
    flags = ["--learning-rate", 1e30, "--max-steps", 1]
    assert run("train", "--data", text, "--output", tmp_path / "out", *SMALL, *flags) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("train: the evaluation after step 1 failed: the loss of batch 0 is nan")
    assert not list((tmp_path / "out").rglob("model.safetensors"))


def test_a_text_of_nothing_is_not_measured(trained, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert run("eval", "--model", trained, "--data", tmp_path) == 2
    told = f"eval: {tmp_path} holds no text of two tokens or more to measure\n"
    assert capsys.readouterr().err == told


def test_half_a_surrogate_pair_is_named_by_its_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n{"text": "half \\ud800"}\n')
    assert run("train", "--data", tmp_path, "--output", tmp_path.parent / "none", *SMALL) == 2
    assert 'a.jsonl:2 must be {"text": …}, got ' in capsys.readouterr().err


def interrupted_at(step: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, the update after so many steps raises, on both sides."""
    update, training_step = minigpt.train.update, ExactTrainer.training_step

    def failing(model, batches, optimizer, number, config):
        if number == step:
            raise error
        return update(model, batches, optimizer, number, config)

    def failing_too(trainer, model, inputs, num_items_in_batch=None):
        if trainer.state.global_step == step:
            raise error
        return training_step(trainer, model, inputs, num_items_in_batch)

    monkeypatch.setattr(minigpt.train, "update", failing)
    monkeypatch.setattr(ExactTrainer, "training_step", failing_too)


@pytest.mark.parametrize(
    "step, error, code, told",
    [
        (3, KeyboardInterrupt(), 130, "stopped; {}/checkpoint-2 is kept: add --resume-from"),
        (1, KeyboardInterrupt(), 130, "stopped before the first checkpoint: the same command"),
        (3, OSError(28, "No space left"), 1, "stopped; {}/checkpoint-2 is kept: add --resume-from"),
        (1, RuntimeError("CUDA out of memory. Tried"), 1, "train: memory is full: make --batch-"),
    ],
)
def test_a_run_that_is_stopped_says_how_it_goes_on(
    step, error, code, told, text, tmp_path, capsys, monkeypatch
):
    flags = ["--data", text, "--output", tmp_path / "out", *SMALL, "--save-steps", 2]
    with monkeypatch.context() as patch:
        interrupted_at(step, error, patch)
        assert run("train", *flags) == code
    assert told.format(tmp_path / "out") in capsys.readouterr().err
    if step > 2:
        assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
        flags.append("--resume-from-checkpoint")
    assert run("train", *flags) == 0


def test_an_error_that_is_ours_is_not_hidden_as_full_memory(side):
    with pytest.raises(RuntimeError, match="shapes"), side.training._memory():
        raise RuntimeError("shapes cannot be multiplied")


def test_a_full_disk_leaves_no_half_picture(side, tmp_path):
    records = [{"step": i, "loss": 1.0 / i, "learning_rate": 0.1} for i in (1, 2, 3)]
    side.runs.draw_curves(records, tmp_path / "curves.png")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            side.runs.draw_curves(records[:2], tmp_path / "curves.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("words", [["--", "--top_p"], ["--top_p is an option"], ["--", "--a_b=c"]])
def test_only_flags_are_spelled_with_dashes_never_a_text(words, trained, capsys):
    assert run("tokenize", "--model", trained, *words) == 0
    *rows, _ = capsys.readouterr().out.splitlines()
    text = "".join(ast.literal_eval(row.split(maxsplit=1)[1]) for row in rows)
    assert text == words[-1]


def test_a_model_is_never_quantized_over_another(trained, tmp_path, capsys):
    other = tmp_path / "other"
    GPT.from_pretrained(trained).save_pretrained(other)
    before = contents(other)
    for output in (other, trained):
        assert run("quantize", "--model", trained, "--output", output, "--bits", 8) == 2
        assert capsys.readouterr().err == (
            "quantize: --output must be another directory than --model or any other model's, "
            f"{output} holds one: nothing is overwritten\n"
        )
    assert contents(other) == before
