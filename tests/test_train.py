"""Step 14: our loop against the Trainer, and what a run survives."""

import dataclasses
import json
import math
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import get_cosine_with_min_lr_schedule_with_warmup

import hf_bridge.optimize
import hf_bridge.train
from hf_bridge.model import GPT as HF
from minigpt import GPT, GPTConfig, lora, optimize
from minigpt import train as train_step
from minigpt.optimize import (
    TrainConfig,
    count_tokens,
    learning_rate,
    make_optimizer,
    summed_loss,
)
from minigpt.runs import Log, find_checkpoint
from minigpt.train import train

VOCABULARY = 61
EXACT = 1e-8  # float64 after 30 steps of AdamW, which divides by small numbers


def new_model(**changes) -> GPT:
    """A small model without dropout, always the same; wide weights, so that mistakes show."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    chance = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPTConfig(**{**sizes, **chance, **ends, "initializer_range": 0.2, **changes})
    return GPT(config, generator=torch.Generator().manual_seed(0))


def batches(i: int) -> dict[str, Tensor]:
    """Two rows of ten; the second is padded on the right, and some labels do not count."""
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(VOCABULARY, (2, 10), generator=generator)
    labels = ids.clone()
    mask = torch.ones_like(ids)
    padding = 1 + i % 5
    mask[1, -padding:] = 0
    ids[1, -padding:] = 0
    labels[1, -padding:] = -100
    labels[0, : i % 4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def weights(model: GPT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: two threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CONFIG = TrainConfig(
    max_steps=30,
    learning_rate=3e-3,
    warmup_steps=5,
    min_lr_rate=0.1,
    gradient_accumulation_steps=2,
    max_grad_norm=0.5,
)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Tensor]:
    """What the Trainer logs in 30 steps in float64, and the embedding it ends with."""
    folder = tmp_path_factory.mktemp("start")
    new_model().double().save_pretrained(folder)
    hf = HF.from_pretrained(folder)
    records = hf_bridge.train.train(
        hf,
        batches,
        hf_bridge.train.TrainConfig(**dataclasses.asdict(CONFIG)),
        progress=False,
    )
    return records, hf.hf.transformer.wte.weight.detach()


def differences(records: list[dict], others: list[dict]) -> float:
    assert [r["step"] for r in records] == [r["step"] for r in others] == list(range(1, 31))
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(records, others))


def test_thirty_steps_have_the_trainers_losses_norms_rates_and_weights(trainers):
    model = new_model().double()
    records = train(model, batches, CONFIG, progress=False)
    assert differences(records, trainers[0]) <= EXACT
    for name in ("grad_norm", "learning_rate", "tokens"):
        for ours, theirs in zip(records, trainers[0]):
            assert ours[name] == pytest.approx(theirs[name], abs=EXACT)
    assert (model.wte.weight - trainers[1]).abs().max() <= EXACT
    assert records[-1]["loss"] < records[0]["loss"]


def decay_all(model, config):
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay
    return optimizer


def decay_norms_and_biases(model, config):
    optimizer = make_optimizer(model, config)
    others = optimizer.param_groups[1]
    small = [p for p in others["params"] if p.dim() < 2]
    others["params"] = [p for p in others["params"] if p.dim() >= 2]
    optimizer.add_param_group({"params": small, "weight_decay": config.weight_decay})
    return optimizer


def no_bias_correction(model, config):
    """As if a million steps had passed: 1 - beta^step is 1."""
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.tensor(1e6),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return optimizer


def decay_in_the_gradient(model, config):
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["decoupled_weight_decay"] = False
    return optimizer


def each_by_itself(parameters, limit):
    return torch.stack([clip_grad_norm_([p], limit) for p in parameters]).norm()


MISTAKES = {
    "decay on embeddings, norms and biases": ("train", "make_optimizer", decay_all),
    "decay on norms and biases": ("train", "make_optimizer", decay_norms_and_biases),
    "decay in the gradient, as in Adam": ("train", "make_optimizer", decay_in_the_gradient),
    "no bias correction": ("train", "make_optimizer", no_bias_correction),
    "clipping after the step": (
        "clipping",
        "clip_grad_norm_",
        lambda parameters, limit: clip_grad_norm_(parameters, math.inf),
    ),
    "clipping each tensor by itself": ("clipping", "clip_grad_norm_", each_by_itself),
    "a schedule one step ahead": (
        "optimize",
        "learning_rate",
        lambda step, config: learning_rate(step + 1, config),
    ),
    "labels not shifted": (
        "optimize",
        "summed_loss",
        lambda model, batch: torch.nn.functional.cross_entropy(
            model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        ),
    ),
    "padding learned": (
        "optimize",
        "summed_loss",
        lambda model, batch: summed_loss(model, {**batch, "labels": batch["input_ids"]}),
    ),
    "a mean of the batches' means": (
        "optimize",
        "summed_loss",
        lambda model, batch: summed_loss(model, batch) / count_tokens(batch) * 9,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_with_the_trainer_notices(mistake, trainers, monkeypatch):
    module, name, wrong = MISTAKES[mistake]
    modules = {"train": train_step, "optimize": optimize, "clipping": torch.nn.utils}
    monkeypatch.setattr(modules[module], name, wrong)
    records = train(new_model().double(), batches, CONFIG, progress=False)
    assert differences(records, trainers[0]) > 1000 * EXACT


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_four_batches_of_two_are_one_batch_of_eight():
    one, four = new_model().double(), new_model().double()
    config = dataclasses.replace(CONFIG, max_steps=6, gradient_accumulation_steps=1)
    whole = train(
        one, lambda i: join([batches(j) for j in range(4 * i, 4 * i + 4)]), config, progress=False
    )
    config = dataclasses.replace(config, gradient_accumulation_steps=4)
    parts = train(four, batches, config, progress=False)
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in parts], abs=1e-12)
    assert (weights(one) - weights(four)).abs().max() <= 1e-10


SIDES = {"minigpt": (optimize, GPT), "hf_bridge": (hf_bridge.optimize, HF)}


def opened(side: str, folder: Path) -> tuple:
    """A side's step, and a float64 model with the same weights on either side."""
    new_model().double().save_pretrained(folder)
    step, kind = SIDES[side]
    return step, kind.from_pretrained(folder)


@pytest.mark.parametrize("side", SIDES)
def test_the_loss_of_rows_padded_left_or_right_is_the_sum_of_the_rows_alone(side, tmp_path):
    step, model = opened(side, tmp_path)
    rows = [torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[3, 4, 2]])]
    alone = sum(step.summed_loss(model, {"input_ids": r, "labels": r}).item() for r in rows)
    for pad in ((0, 2), (2, 0)):
        wide = [rows[0], torch.nn.functional.pad(rows[1], pad)]
        mask = torch.cat([torch.ones(1, 5), torch.nn.functional.pad(torch.ones(1, 3), pad)])
        ids = torch.cat(wide)
        labels = ids.masked_fill(mask == 0, -100)
        if pad == (2, 0):
            labels[1, 2] = -100  # nothing stands before a row's first token
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}
        assert step.summed_loss(model, batch).item() == pytest.approx(alone, abs=1e-10)


def test_both_learn_the_same_from_rows_padded_on_the_left(tmp_path):
    def flipped(i):
        batch = {name: tensor.flip(1) for name, tensor in batches(i).items()}
        first = batch["attention_mask"].argmax(dim=1, keepdim=True)
        return {**batch, "labels": batch["labels"].scatter(1, first, -100)}

    _, ours = opened("minigpt", tmp_path)
    _, theirs = opened("hf_bridge", tmp_path)
    config = hf_bridge.train.TrainConfig(**dataclasses.asdict(CONFIG))
    records = train(ours, flipped, CONFIG, progress=False)
    others = hf_bridge.train.train(theirs, flipped, config, progress=False)
    assert differences(records, others) <= EXACT


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("hole", [[1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]], ids=str)
def test_a_mask_with_a_hole_has_no_loss(side, hole, tmp_path):
    step, model = opened(side, tmp_path)
    ids, mask = torch.tensor([[5, 6, 7, 8]] * 2), torch.tensor([[1, 1, 1, 1], hole])
    with pytest.raises(ValueError, match="attention_mask must be 0s, then 1s, in each row"):
        step.summed_loss(model, {"input_ids": ids, "labels": ids, "attention_mask": mask})


@pytest.mark.parametrize("side", SIDES)
def test_a_loss_is_of_tokens_in_the_vocabulary_that_fit_the_context(side, tmp_path):
    step, model = opened(side, tmp_path)
    for ids, message in [
        (torch.tensor([[1, 61]]), r"token ids must be in \[0, 61\), the vocabulary, got 61"),
        (torch.ones(1, 17).long(), "needs room for 17 tokens, but the context holds 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            step.summed_loss(model, {"input_ids": ids, "labels": ids})
        config = step.TrainConfig(max_steps=2, learning_rate=0.1, warmup_steps=1)
        start = train if side == "minigpt" else hf_bridge.train.train
        with pytest.raises(ValueError, match=message):
            start(model, [{"input_ids": ids, "labels": ids}].__getitem__, config, progress=False)


def test_our_schedule_is_transformers_cosine_with_a_floor():
    config = TrainConfig(max_steps=40, learning_rate=0.5, warmup_steps=7, min_lr_rate=0.2)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 7, 40, min_lr_rate=0.2)
    for step in range(41):
        assert learning_rate(step, config) == pytest.approx(0.5 * schedule.lr_lambdas[0](step))
        assert learning_rate(step, config) == pytest.approx(
            hf_bridge.train.learning_rate(
                step, hf_bridge.train.TrainConfig(**dataclasses.asdict(config))
            )
        )


def test_only_matrices_that_are_no_embeddings_decay():
    model = new_model()
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, others = make_optimizer(model, CONFIG).param_groups
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(names[id(p)] for p in decaying["params"]) == sorted(
        f"h.{i}.{layer}.weight" for i in range(2) for layer in layers
    )
    assert len(others["params"]) + 8 == len(names)


def test_only_what_requires_grad_is_trained_and_kept(tmp_path):
    model = new_model().requires_grad_(False)
    model.h[1].attn.c_attn.requires_grad_(True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    train(
        model,
        batches,
        TrainConfig(max_steps=3, save_steps=3),
        output_dir=tmp_path,
        progress=False,
    )
    changed = [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])]
    assert changed == ["h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias"]
    kept = (tmp_path / "checkpoint-3" / "trained.safetensors").stat().st_size
    assert kept < 4 * weights(model).numel() / 2


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        train(new_model().requires_grad_(False), batches, CONFIG, progress=False)


class Crash(Exception):
    pass


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_that_ends_at_any_step_goes_on_to_the_same_weights(step, optim, tmp_path):
    config = TrainConfig(max_steps=8, warmup_steps=2, save_steps=1, eval_steps=2, optim=optim)

    def until(i):
        if i == step:
            raise Crash
        return batches(i)

    def evaluate(model):
        loss = summed_loss(model, batches(99)).item()
        return {"loss": loss, "perplexity": math.exp(loss / count_tokens(batches(99)))}

    straight = new_model(resid_pdrop=0.1, embd_pdrop=0.1)
    records = train(straight, batches, config, evaluate=evaluate, progress=False)
    crashed = new_model(resid_pdrop=0.1, embd_pdrop=0.1)
    if step < 8:
        with pytest.raises(Crash):
            train(crashed, until, config, output_dir=tmp_path, evaluate=evaluate, progress=False)
    else:
        train(crashed, until, config, output_dir=tmp_path, evaluate=evaluate, progress=False)
    resumed = new_model(resid_pdrop=0.1, embd_pdrop=0.1)
    again = train(
        resumed,
        batches,
        config,
        output_dir=tmp_path,
        evaluate=evaluate,
        resume_from_checkpoint=True,
        progress=False,
    )
    assert torch.equal(weights(resumed), weights(straight))
    timeless = [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in again] == timeless
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == again
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_line_of_the_log_that_was_cut_off_is_written_again(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    with Log(tmp_path, step=2) as log:
        log.write({"step": 3})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_training_leaves_the_callers_chance_alone():
    model = new_model(resid_pdrop=0.5)
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    train(model, batches, TrainConfig(max_steps=2), progress=False)
    assert torch.equal(torch.rand(4), want)
    other = new_model(resid_pdrop=0.5)
    train(other, batches, TrainConfig(max_steps=2, seed=1), progress=False)
    assert not torch.equal(weights(model), weights(other))


def test_a_loss_that_is_no_number_stops_with_step_and_batch_and_spares_the_weights(tmp_path):
    model = new_model()
    config = TrainConfig(max_steps=5, gradient_accumulation_steps=2)
    seen = []

    def poisoned(i):
        seen.append(i)
        if i == 5:
            model.ln_f.weight.data[0] = math.inf
            seen.append(weights(model))
        return batches(i)

    with pytest.raises(FloatingPointError, match=r"the loss of step 3 \(batch 4\) is nan"):
        train(model, poisoned, config, progress=False)
    assert torch.equal(weights(model), seen[-1])


def test_a_gradient_that_is_no_number_stops_too():
    model = new_model()
    model.wte.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"the gradient of step 1 \(batch 0\) is nan|inf"):
        train(model, batches, TrainConfig(max_steps=5), progress=False)
    assert torch.equal(weights(model), weights(new_model()))


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(tmp_path):
    config = TrainConfig(max_steps=6, save_steps=2)
    straight = new_model()
    train(straight, batches, config, progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(i):
        if i == 3:  # from here on the kernel refuses files of more than 4 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        return batches(i)

    try:
        with pytest.raises(OSError, match=r"cannot write .*\.checkpoint-4\.part/trained"):
            train(new_model(), filling, config, output_dir=tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-2", "curves.png", "log.jsonl"]
    resumed = new_model()
    train(
        resumed, batches, config, output_dir=tmp_path, resume_from_checkpoint=True, progress=False
    )
    assert torch.equal(weights(resumed), weights(straight))


def test_a_full_disk_leaves_the_best_model_whole(tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*model\.safetensors"):
            new_model(initializer_range=0.1).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder of a run of two steps."""
    config = TrainConfig(max_steps=2, save_steps=2)
    train(new_model(), batches, config, output_dir=tmp_path, progress=False)
    return tmp_path


@pytest.mark.parametrize(
    "model, provider, changes, message",
    [
        ({}, batches, {"learning_rate": 0.5}, "learning_rate is 0.001 there, 0.5 here"),
        ({"n_layer": 3}, batches, {}, "model.n_layer is 2 there, 3 here"),
        ({}, lambda i: batches(i + 1), {}, r"first batch is \d+ there, \d+ here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(finished, model, provider, changes, message):
    config = TrainConfig(**{"max_steps": 2, "save_steps": 2, **changes})
    with pytest.raises(ValueError, match=f"checkpoint-2 is of another run: .*{message}.*; give"):
        train(
            new_model(**model),
            provider,
            config,
            output_dir=finished,
            resume_from_checkpoint=True,
            progress=False,
        )
    assert find_checkpoint(finished) == finished / "checkpoint-2"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"alpha": 8}, "alpha is 4 there, 8 here"),
        ({"dropout": 0.1}, "dropout is 0.0 there, 0.1 here"),
        ({"rslora": True}, "rslora is False there, True here"),
        ({"qkv": "qk"}, "qkv is qv there, qk here"),
    ],
)
def test_a_run_does_not_go_on_with_another_adapter(changes, message, tmp_path):
    def adapted(**changes):
        model = new_model()
        lora.adapt(model, **{"rank": 2, "alpha": 4, "qkv": "qv", **changes})
        return model

    config = TrainConfig(max_steps=1, save_steps=1)
    options = {"output_dir": tmp_path, "progress": False}
    train(adapted(), batches, config, **options)
    train(adapted(), batches, config, resume_from_checkpoint=True, **options)
    with pytest.raises(ValueError, match=f"of another run: adapters.default.{message}"):
        train(adapted(**changes), batches, config, resume_from_checkpoint=True, **options)


def test_a_new_run_does_not_overwrite_an_old_one(finished):
    with pytest.raises(ValueError, match="checkpoint-2 is there already: resume it"):
        train(new_model(), batches, TrainConfig(max_steps=2), output_dir=finished, progress=False)


def test_resuming_needs_a_checkpoint(tmp_path):
    for module in (train_step, hf_bridge.train):
        model = new_model() if module is train_step else HF(new_model_hf_config())
        with pytest.raises(ValueError, match="has no checkpoint to resume from"):
            module.train(
                model,
                batches,
                module.TrainConfig(max_steps=2),
                output_dir=tmp_path,
                resume_from_checkpoint=True,
                progress=False,
            )


@pytest.mark.parametrize("side", SIDES)
def test_a_checkpoint_that_is_damaged_or_of_another_program_is_refused(side, tmp_path):
    module = train_step if side == "minigpt" else hf_bridge.train

    def run(resume: bool) -> None:
        model = new_model() if side == "minigpt" else HF(new_model_hf_config())
        config = module.TrainConfig(max_steps=1, save_steps=1)
        options = {"output_dir": tmp_path, "resume_from_checkpoint": resume, "progress": False}
        module.train(model, batches, config, **options)

    run(False)
    checkpoint = tmp_path / "checkpoint-1"
    for file in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.pt")]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"checkpoint-1.* is damaged \(.*\): begin anew in"):
            run(True)
        file.write_bytes(whole)
    next(checkpoint.glob("*state.json")).unlink()
    with pytest.raises(ValueError, match=r"state.json is missing: .*checkpoint-1 is of another"):
        run(True)


def new_model_hf_config():
    from hf_bridge.config import GPTConfig as HFConfig

    return HFConfig(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_trainer_resumes_to_the_same_weights_too(optim, tmp_path):
    config = hf_bridge.train.TrainConfig(max_steps=6, save_steps=2, warmup_steps=2, optim=optim)

    def new() -> HF:
        return HF(new_model_hf_config(), generator=torch.Generator().manual_seed(0))

    def until(i):
        if i == 5:
            raise Crash
        return batches(i)

    straight, crashed, resumed = new(), new(), new()
    records = hf_bridge.train.train(straight, batches, config, progress=False)
    with pytest.raises(Crash):
        hf_bridge.train.train(crashed, until, config, output_dir=tmp_path, progress=False)
    again = hf_bridge.train.train(
        resumed, batches, config, output_dir=tmp_path, resume_from_checkpoint=True, progress=False
    )
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    assert torch.equal(resumed.hf.lm_head.weight, straight.hf.lm_head.weight)
    with pytest.raises(ValueError, match=r"settings.json is of another run: learning_rate is 0.0"):
        hf_bridge.train.train(
            new(),
            batches,
            dataclasses.replace(config, learning_rate=0.5),
            output_dir=tmp_path,
            resume_from_checkpoint=True,
            progress=False,
        )


def perplexities(values: list[float]):
    """An evaluation that returns these one after the other."""
    numbers = iter(values)
    return lambda model: {"perplexity": next(numbers)}


@pytest.mark.parametrize("side", ["minigpt", "hf_bridge"])
def test_the_best_model_is_kept_and_patience_ends_the_run(side, tmp_path):
    module = train_step if side == "minigpt" else hf_bridge.train
    model = new_model() if side == "minigpt" else HF(new_model_hf_config())
    saved = []
    records = module.train(
        model,
        batches,
        module.TrainConfig(max_steps=20, eval_steps=2, early_stopping_patience=2),
        output_dir=tmp_path,
        evaluate=perplexities([9.0, 5.0, 6.0, 4.0, 7.0, 4.0, 1.0]),
        save=lambda model, folder: saved.append((len(saved), folder)),
        progress=False,
    )
    assert [r["eval_perplexity"] for r in records if "eval_perplexity" in r] == [9, 5, 6, 4, 7, 4]
    assert max(r["step"] for r in records) == 12
    assert saved == [(i, tmp_path / "best") for i in range(3)]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("side", ["minigpt", "hf_bridge"])
def test_an_evaluation_without_the_metric_is_refused_with_what_it_gave(side, tmp_path):
    module = train_step if side == "minigpt" else hf_bridge.train
    model = new_model() if side == "minigpt" else HF(new_model_hf_config())
    with pytest.raises(ValueError, match=r"evaluate must return perplexity, got .*accuracy 0.5"):
        module.train(
            model,
            batches,
            module.TrainConfig(max_steps=1),
            output_dir=tmp_path,
            evaluate=lambda model: {"accuracy": 0.5},
            progress=False,
        )


@pytest.mark.parametrize("side", ["minigpt", "hf_bridge"])
def test_a_step_without_a_label_is_refused(side):
    module = train_step if side == "minigpt" else hf_bridge.train
    model = new_model() if side == "minigpt" else HF(new_model_hf_config())
    empty = {**batches(0), "labels": torch.full((2, 10), -100)}
    with pytest.raises(ValueError, match="step 1 has no token to learn: every label is -100"):
        module.train(model, lambda i: empty, module.TrainConfig(max_steps=1), progress=False)


def test_the_trainer_stops_at_a_loss_that_is_no_number():
    model = HF(new_model_hf_config())

    def poisoned(i):
        if i == 2:
            model.hf.transformer.ln_f.weight.data[0] = math.inf
        return batches(i)

    with pytest.raises(FloatingPointError, match=r"the loss of step 3 \(batch 2\) is nan"):
        config = hf_bridge.train.TrainConfig(max_steps=5)
        hf_bridge.train.train(model, poisoned, config, progress=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps must be at least 1, got 0",
        ),
        ({"learning_rate": math.nan}, "learning_rate must be a positive number, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"optim": "sgd"}, "optim must be one of adamw, muon, got 'sgd'"),
        ({"save_steps": -2}, "save_steps must be 0 or more, got -2"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\), got 1.0"),
        ({"warmup_steps": 9}, r"warmup_steps must be in \[0, max_steps\], got 9 of 5"),
        ({"min_lr_rate": 2.0}, r"min_lr_rate must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"max_steps": 5, **options})


def test_bf16_autocast_computes_nearly_the_same_and_keeps_float32_weights():
    exact, fast = new_model(), new_model()
    config = TrainConfig(max_steps=4, learning_rate=1e-2)
    want = train(exact, batches, config, progress=False)
    got = train(fast, batches, dataclasses.replace(config, bf16=True), progress=False)
    assert fast.wte.weight.dtype == torch.float32
    # bfloat16 has 8 bits: a few parts in a thousand, here of losses near 10.
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in want], rel=0.02)
    assert [r["loss"] for r in got] != [r["loss"] for r in want]
