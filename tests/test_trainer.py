"""What the Trainer must be told, law by law: to go on exactly, to stop in time, to lose nothing."""

import dataclasses
import json
import math
import random
import resource
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from hf_bridge import lora, optimize
from hf_bridge.config import GPTConfig
from hf_bridge.files import writing
from hf_bridge.model import GPT
from hf_bridge.runs import Log
from hf_bridge.train import TrainConfig, train

SMALL = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}


def new_model(**changes: object) -> GPT:
    """A small model, always the same, with dropout."""
    chance = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPTConfig(**{**SMALL, **chance, **ends, **changes})
    return GPT(config, generator=torch.Generator().manual_seed(0))


def batches(i: int) -> dict[str, Tensor]:
    """Two rows of ten."""
    ids = torch.randint(31, (2, 10), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "labels": ids}


def weights(model: GPT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def perplexities(values: list[float]):
    """An evaluation that returns these one after the other."""
    numbers = iter(values)
    return lambda model: {"perplexity": next(numbers)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: two threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Crash(Exception):
    pass


def crashing_at(step: int):
    def provider(i: int) -> dict[str, Tensor]:
        if i == step:
            raise Crash
        return batches(i)

    return provider


SCORES = [9.0, 5.0, 6.0, 7.0, 8.0]  # after steps 1 to 5: patience 3 ends the run there
CONFIG = TrainConfig(
    max_steps=8, warmup_steps=2, save_steps=2, eval_steps=1, early_stopping_patience=3
)


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_goes_on_to_the_same_weights_and_stops_where_it_would_have(step, tmp_path):
    straight, crashed, resumed = new_model(), new_model(), new_model()
    records = train(straight, batches, CONFIG, evaluate=perplexities(SCORES), progress=False)
    assert records[-1]["step"] == 5
    folder = {"output_dir": tmp_path, "progress": False}
    with pytest.raises(Crash):
        provider = crashing_at(step)
        train(crashed, provider, CONFIG, evaluate=perplexities(SCORES), **folder)
    kept = 2 * (step // 2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{kept}"]
    rest = perplexities(SCORES[kept:])
    again = train(resumed, batches, CONFIG, evaluate=rest, resume_from_checkpoint=True, **folder)
    assert timeless(again) == timeless(records)
    assert torch.equal(weights(resumed), weights(straight))
    # The last checkpoint stays, though step 2 was the best; and now nothing is left to do.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    over = new_model()
    nothing = perplexities([])
    train(over, batches, CONFIG, evaluate=nothing, resume_from_checkpoint=True, **folder)
    assert torch.equal(weights(over), weights(straight))


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(tmp_path):
    config = TrainConfig(max_steps=5, save_steps=2)
    straight, resumed = new_model(), new_model()
    train(straight, batches, config, progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(i: int) -> dict[str, Tensor]:
        if i == 3:  # from here on the kernel refuses files of more than 8 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        return batches(i)

    try:
        with pytest.raises(OSError, match=f"cannot write {tmp_path}: "):
            train(new_model(), filling, config, output_dir=tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob(".*"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    train(
        resumed, batches, config, output_dir=tmp_path, resume_from_checkpoint=True, progress=False
    )
    assert torch.equal(weights(resumed), weights(straight))


def test_a_full_disk_leaves_the_best_model_whole(tmp_path):
    new_model().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {tmp_path}: "):
            new_model(n_layer=2).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_not_whole_is_not_written(tmp_path):
    with pytest.raises(Crash), writing(tmp_path / "best") as part:
        (part / "model").write_text("half")
        raise Crash
    assert not list((tmp_path / "best").iterdir())


def test_a_gradient_that_is_no_number_spares_the_weights():
    model = new_model()
    before = weights(model).clone()
    model.hf.transformer.wte.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"gradient of step 1 \(batch 0\) is (nan|inf)"):
        train(model, batches, TrainConfig(max_steps=2), progress=False)
    assert torch.equal(weights(model), before)


def test_the_norm_is_measured_where_nothing_is_clipped():
    records = train(new_model(), batches, TrainConfig(max_steps=1, max_grad_norm=0), progress=False)
    clipped = train(new_model(), batches, TrainConfig(max_steps=1), progress=False)
    assert records[0]["grad_norm"] == clipped[0]["grad_norm"] > 0


def test_training_leaves_the_callers_chance_alone():
    def draws() -> list[float]:
        return [random.random(), numpy.random.rand(), torch.rand(1).item()]

    def seed() -> None:
        random.seed(3)
        numpy.random.seed(3)
        torch.manual_seed(3)

    seed()
    want = draws()
    seed()
    train(new_model(), batches, TrainConfig(max_steps=1), progress=False)
    assert draws() == want


def test_a_model_with_nothing_to_train_is_refused():
    model = new_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        train(model, batches, TrainConfig(max_steps=1), progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run of one step."""
    folder = tmp_path_factory.mktemp("finished")
    model = new_model()
    lora.adapt(model, rank=2, alpha=4)
    config = TrainConfig(max_steps=1, save_steps=1)
    train(model, batches, config, output_dir=folder, save=lora.save, progress=False)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": {"adam_beta1": 0.8}}, "adam_beta1 is 0.9 there, 0.8 here"),
        ({"model": {"n_head": 4}}, "model.n_head is 2 there, 4 here"),
        ({"lora": {"alpha": 8}}, "default.lora_alpha is 4 there, 8 here"),
        ({"lora": {"dropout": 0.1}}, "default.lora_dropout is 0.0 there, 0.1 here"),
        ({"lora": {"rslora": True}}, "default.use_rslora is False there, True here"),
        ({"lora": {"qkv": "qv"}}, "default.qkv is qkv there, qv here"),
        ({"lora": {"rank": 3}}, r"lora_A.default.weight is \(2, 16\) there, \(3, 16\) here"),
        ({"provider": lambda i: batches(i + 1)}, r"first batch is \d+ there, \d+ here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes, message, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    model = new_model(**changes.get("model", {}))
    lora.adapt(model, **{"rank": 2, "alpha": 4, **changes.get("lora", {})})
    config = TrainConfig(max_steps=1, save_steps=1)
    with pytest.raises(ValueError, match=f"settings.json is of another run: .*{message}.*; give"):
        train(
            model,
            changes.get("provider", batches),
            dataclasses.replace(config, **changes.get("config", {})),
            output_dir=finished,
            resume_from_checkpoint=True,
            progress=False,
        )
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after == before


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=r"settings.json is missing: .*checkpoint-2 is of another"):
        train(
            new_model(),
            batches,
            TrainConfig(max_steps=3),
            output_dir=tmp_path,
            resume_from_checkpoint=True,
            progress=False,
        )


def test_a_line_of_the_log_that_was_cut_off_is_written_again(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = Log(tmp_path, step=2)
    log.write({"step": 3, "loss": 0.5})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == log.records
    assert log.records == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_the_configuration_is_minigpts_to_the_last_default():
    from minigpt.optimize import TrainConfig as Ours

    assert dataclasses.asdict(Ours(max_steps=3)) == dataclasses.asdict(TrainConfig(max_steps=3))


BAD = [
    {"max_steps": 0},
    {"gradient_accumulation_steps": 0},
    {"learning_rate": math.nan},
    {"learning_rate": 0.0},
    {"adam_epsilon": math.inf},
    {"weight_decay": -1.0},
    {"max_grad_norm": math.nan},
    {"eval_steps": -1},
    {"save_steps": -2},
    {"early_stopping_patience": -1},
    {"adam_beta2": 1.0},
    {"warmup_steps": 9},
    {"warmup_steps": -1},
    {"min_lr_rate": 2.0},
    {"seed": -1},
]


@pytest.mark.parametrize("numbers", BAD, ids=str)
def test_both_sides_refuse_the_same_numbers_with_the_same_words(numbers):
    from minigpt.optimize import TrainConfig as Ours

    told = []
    for side in (Ours, TrainConfig):
        with pytest.raises(ValueError) as caught:
            side(**{"max_steps": 5, **numbers})
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert told[0].startswith(f"{next(iter(numbers))} must be ")


def test_a_run_that_fails_at_once_draws_nothing(tmp_path):
    empty = {**batches(0), "labels": torch.full((2, 10), -100)}
    with pytest.raises(ValueError, match="step 1 has no token to learn"):
        train(new_model(), lambda i: empty, CONFIG, output_dir=tmp_path, progress=False)
    assert not (tmp_path / "curves.png").exists()


def test_the_loss_of_a_float64_model_is_float64():
    model = new_model().double()
    assert optimize.summed_loss(model, batches(0)).dtype == torch.float64
