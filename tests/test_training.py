"""The commands train, finetune and eval: what they write, refuse, and survive."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

import hf_bridge.__main__
import hf_bridge.corpus
import hf_bridge.training
import minigpt.__main__
from hf_bridge.model import GPT as HF
from minigpt import GPT, Tokenizer, lora
from minigpt.corpus import read_pairs
from minigpt.engine import Engine
from minigpt.training import CONFIGS, _example

ROOT = Path(__file__).parent.parent
SIDES = {"minigpt": minigpt.__main__, "hf_bridge": hf_bridge.__main__}
BOTH = pytest.mark.parametrize("side", SIDES)
WORDS = "el gato come pescado y la casa es blanca . the cat eats fish and the house is white ."
SMALL = ["--chunk-size", "16", "--vocab-size", "300", "--batch-size", "4", "--max-steps", "4"]


@pytest.fixture(autouse=True, scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """One thread, and a configuration that is quick to train, under the name of the smallest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    patch.setitem(hf_bridge.training.CONFIGS, "tiny", sizes)
    patch.setitem(CONFIGS, "tiny", replace(CONFIGS["tiny"], **sizes))
    yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3 kB of sentences."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    words = WORDS.split()
    path.write_text(" ".join(Random(0).choices(words, k=600)), encoding="utf-8")
    return path


def run(side: str, *arguments: object) -> int:
    return SIDES[side].main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """A model that each side has trained with the same flags."""
    folders = {}
    for side in SIDES:
        folders[side] = tmp_path_factory.mktemp(side)
        assert run(side, "train", "--data", text, "--output", folders[side], *SMALL) == 0
    return folders


@BOTH
def test_a_text_file_becomes_a_model_that_both_sides_load_and_the_chat_can_drive(side, trained):
    folder = trained[side]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl"} <= names
    assert {"curves.png", "best", "checkpoint-4", "chunks.jsonl"} <= names
    ours, theirs = GPT.from_pretrained(folder), HF.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    assert (ours(ids) - theirs(ids)).abs().max() < 1e-5  # float32
    engine = Engine.from_pretrained(folder)
    prompt = engine.render([{"role": "user", "content": "el gato"}])
    assert engine.decode(list(engine.stream(prompt, max_new_tokens=4, seed=0)))


def test_both_sides_learn_the_same_tokenizer_and_chunks(trained):
    for name in ("tokenizer.json", "chunks.jsonl"):
        ours, theirs = ((trained[side] / name).read_text("utf-8") for side in SIDES)
        if name == "chunks.jsonl":
            assert ours == theirs
        else:
            assert json.loads(ours)["model"]["merges"] == json.loads(theirs)["model"]["merges"]


@BOTH
def test_the_log_has_each_step_and_evaluation(side, trained):
    lines = (trained[side] / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "seconds"} < records[0].keys()
    last = records[-1]
    assert last.keys() == {
        "step",
        "eval_loss",
        "eval_perplexity",
        "eval_distinct_1",
        "eval_distinct_2",
    }
    assert 0 < last["eval_distinct_1"] <= last["eval_distinct_2"] <= 1
    assert last["eval_loss"] < records[0]["loss"]


@BOTH
def test_matrices_learn_by_muon_on_demand(side, trained, text, tmp_path):
    folder = tmp_path / "out"
    flags = ["--data", text, "--output", folder, *SMALL, "--optim", "muon"]
    assert run(side, "train", *flags) == 0
    muon, adamw = (
        [json.loads(line).get("loss") for line in (path / "log.jsonl").read_text().splitlines()]
        for path in (folder, trained[side])
    )
    assert muon[0] == adamw[0]
    assert muon[3] not in (muon[0], adamw[3])
    assert GPT.from_pretrained(folder).config.n_embd == 32


@BOTH
def test_both_sides_measure_the_same_model_alike(side, trained, text, capsys):
    assert run(side, "eval", "--model", trained["minigpt"], "--data", text, "--stride", "7") == 0
    out = capsys.readouterr().out
    tokens = Tokenizer.from_pretrained(trained["minigpt"]).encode(text.read_text("utf-8"))
    assert re.search(rf"tokens +{len(tokens) - 1:,}\n", out)
    scores = dict(line.split() for line in out.splitlines())
    want = json.loads((trained["minigpt"] / "log.jsonl").read_text().splitlines()[-1])
    assert float(scores["loss"]) == pytest.approx(want["eval_loss"], rel=0.1)
    assert scores.keys() == {"loss", "perplexity", "tokens", "distinct_1", "distinct_2"}


@BOTH
@pytest.mark.parametrize("method", ["full", "lora", "adapters"])
def test_fine_tuning_by_every_method_lowers_the_loss_of_the_completions(
    side, method, trained, tmp_path, capsys
):
    pairs = [{"prompt": "¿el gato?", "completion": "come pescado"}] * 12
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    output = tmp_path / "out"
    flags = ["--learning-rate", 1e-2, "--max-steps", 6, "--batch-size", 4, "--method", method]
    flags += ["--data", tmp_path / "pairs.jsonl", "--output", output]
    assert run(side, "finetune", "--model", trained["minigpt"], *flags) == 0
    told = capsys.readouterr().err
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    # Few parameters over weights that know next to nothing: they can help a little.
    assert records[-1]["eval_loss"] < records[0]["loss"] * (0.9 if method == "full" else 0.995)
    again = ["--resume-from-checkpoint", *flags]
    assert run(side, "finetune", "--model", trained["minigpt"], *again) == 0  # nothing left to do
    total = sum(p.numel() for p in GPT.from_pretrained(trained["minigpt"]).parameters())
    if method == "full":
        assert f"training {total:,} of {total:,} parameters (100.00%)" in told
    marked = [line for line in told.splitlines() if line.endswith("  <-")]
    assert [line.split()[0] for line in marked] == [{"lora": "LoRA"}.get(method, method)]
    assert re.search(rf"\nfull +{total:,} +100\.00%", told)
    if method == "adapters":
        assert not (output / "model.safetensors").exists()
        words = f"python -m chatbot --model {trained['minigpt']} --adapter {output / 'best'}\n"
        assert told.endswith(words)
        assert any((output / "best").glob("*.safetensors"))
        return
    model = GPT.from_pretrained(output)
    if method == "lora":  # merged: the base and the adapter beside it are the same model
        added = 2 * 8 * (32 + 96)
        assert f"training {added:,} of {total + added:,} parameters" in told
        base = GPT.from_pretrained(trained["minigpt"])
        lora.load(base, output / "best")
        ids = torch.tensor([[1, 2, 3, 4]])
        assert (base(ids) - model(ids)).abs().max() < 1e-4  # float32


@pytest.mark.parametrize("method", ["full", "lora", "adapters"])
def test_both_sides_fine_tune_with_the_same_losses(method, trained, text, tmp_path):
    flags = ["--data", text, "--max-length", 16, "--max-steps", 5, "--batch-size", 2]
    flags += ["--learning-rate", 1e-2, "--method", method, "--targets", "c_attn", "c_proj"]
    (tmp_path / "corpus.txt").write_text(text.read_text("utf-8").replace(" . ", ".\n\n"))
    flags[1] = tmp_path / "corpus.txt"
    for side in SIDES:
        output = ["--output", tmp_path / side]
        assert run(side, "finetune", "--model", trained["minigpt"], *output, *flags) == 0
    # float32: sums in another order
    assert losses(tmp_path / "minigpt") == pytest.approx(losses(tmp_path / "hf_bridge"), rel=1e-5)


def test_a_prompt_is_a_turn_of_the_chat_and_is_not_learned(trained):
    engine = Engine.from_pretrained(trained["minigpt"])
    example = _example(engine, "el gato", "come")
    ids, labels = list(example["input_ids"]), list(example["labels"])
    assert engine.decode(ids) == "User: el gato\nAssistant: come"
    assert ids[-1] == labels[-1] == engine.tokenizer.eos_token_id
    learned = [i for i, label in zip(ids, labels) if label != -100]
    assert engine.decode(learned) == " come"
    plain = _example(engine, "", "come")
    assert plain["labels"] == plain["input_ids"]


def test_examples_are_pairs_texts_or_paragraphs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"text": "t"}\n')
    (tmp_path / "b.txt").write_text("one\ntwo\n\n \nthree\n")
    want = [("p", "c"), ("", "t"), ("", "one\ntwo"), ("", "three")]
    assert list(read_pairs(tmp_path)) == list(hf_bridge.corpus.read_pairs(tmp_path)) == want
    (tmp_path / "a.jsonl").write_text('{"completion": "c"}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl:1 must be \{"prompt": …\}, got '):
        list(read_pairs(tmp_path))


@BOTH
@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--chunk-size", 65], 2, "chunk_size must be at most the model's context of 64, got 65"),
        (["--batch-size", 500], 2, "batch_size must be at most the number of rows"),
        (["--vocab-size", 9], 2, "vocab_size must be at least 257"),
        (["--validation-split", 1.5], 2, "the share to evaluate must be in (0, 1), got 1.5"),
        (["--learning-rate", 1e30], 1, "is nan: lower the learning rate, or look at that batch"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_a_code(
    side, flags, code, message, text, tmp_path, capsys
):
    got = run(side, "train", "--data", text, "--output", tmp_path / "out", *SMALL, *flags)
    told = capsys.readouterr().err
    assert (got, told.count("train: ")) == (code, 1)
    assert message in told
    assert not (tmp_path / "out" / "model.safetensors").exists()


@BOTH
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no text: there is nothing to learn"),
        (b"\x00\x01", "must be text, got a zero byte at 0"),
        (b"\xff\xfe", "must be UTF-8 text, got byte 0xff at 0"),
        (b"corto", "at least 2 rows are needed, one of them to evaluate, got 1"),
    ],
)
def test_a_corpus_that_is_none_is_one_line(side, content, message, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_bytes(content)
    data = tmp_path / "corpus.txt"
    assert run(side, "train", "--data", data, "--output", tmp_path / "out", *SMALL) == 2
    assert message in capsys.readouterr().err


@BOTH
def test_a_run_is_not_overwritten_nor_resumed_otherwise(side, trained, text, capsys):
    before = (trained[side] / "model.safetensors").read_bytes()
    flags = ["--data", text, "--output", trained[side], *SMALL]
    assert run(side, "train", *flags) == 2
    assert "checkpoint-4 is there already: resume it" in capsys.readouterr().err
    assert run(side, "train", *flags, "--resume-from-checkpoint", "--learning-rate", 0.5) == 2
    assert "learning_rate is 0.001 there, 0.5 here" in capsys.readouterr().err
    assert (trained[side] / "model.safetensors").read_bytes() == before
    assert run(side, "train", *flags, "--resume-from-checkpoint") == 0  # nothing left to do
    assert (trained[side] / "model.safetensors").read_bytes() == before


def command(*arguments: object) -> list[str]:
    """The command line in a process of its own; its own sizes, so the smallest steps."""
    small = [*SMALL[:-2], "--max-steps", "12", "--save-steps", "2", "--eval-steps", "4"]
    return ["-m", "minigpt", "train", *map(str, arguments), *small]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run of 12 steps in one process."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = command("--data", text, "--output", folder)
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, env=ENVIRONMENT)
    return folder


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_in_the_same_weights(straight, text, tmp_path):
    arguments = [sys.executable, *command("--data", text, "--output", tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT) as process:
        log = tmp_path / "log.jsonl"
        while not (log.is_file() and '"step": 5' in log.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "model.safetensors").exists()
    resume = [*arguments, "--resume-from-checkpoint"]
    subprocess.run(resume, check=True, cwd=ROOT, env=ENVIRONMENT)
    assert losses(tmp_path) == losses(straight)
    for name in ("model.safetensors", "checkpoint-12/optimizer.safetensors"):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.slow
@BOTH
def test_two_processes_have_the_losses_of_one(side, straight, text, tmp_path):
    arguments = command("--data", text, "--output", tmp_path)
    arguments[1] = side
    one = straight
    if side == "hf_bridge":
        one = tmp_path / "one"
        single = [argument.replace(str(tmp_path), str(one)) for argument in arguments]
        subprocess.run([sys.executable, *single], check=True, cwd=ROOT, env=ENVIRONMENT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *torchrun, *arguments], check=True, cwd=ROOT, env=ENVIRONMENT)
    # float32: sums in another order
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-4)
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path, one))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3


@pytest.mark.slow
def test_a_terminal_shows_a_bar_with_loss_rate_and_speed(text, tmp_path):
    arguments = [sys.executable, *command("--data", text, "--output", tmp_path)]
    pid, terminal = pty.fork()
    if pid == 0:
        termios.tcsetwinsize(0, (30, 120))
        os.chdir(ROOT)
        os.execve(sys.executable, arguments, ENVIRONMENT)
    shown = b""
    while select.select([terminal], [], [], 120)[0]:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:  # the other end has closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    screen = shown.decode()
    assert re.search(r"12/12 .*loss=\d+\.\d+, lr=\d\.\de-\d+, tokens/s=[\d,]+", screen)
    assert re.search(r"step 12  loss [\d.]+  perplexity [\d.]+  distinct_1 ", screen)
    assert f"python -m chatbot --model {tmp_path}" in screen
