"""QLoRA: LoRA over codes trains alike on both sides, and merges only into floats."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_lora import loss_of, new_base
from safetensors.torch import load_file
from torch import Tensor, nn

import hf_bridge
import minigpt
from minigpt.quant_linear import Linear4bit

SIDES = ("minigpt", "hf_bridge")
BOTH = pytest.mark.parametrize("side", SIDES)
KINDS = pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
EVERYWHERE = ("c_attn", "c_proj", "c_fc")
# Codes are multiplied in float32, summed in another order on each side; AdamW divides a gradient by
# its own size, so that of one near zero the rounding counts. This is a hundredth of one step.
TRAINED = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower in two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model of a shape that bitsandbytes computes rightly."""
    return new_base(tmp_path_factory.mktemp("base"), n_embd=64, n_head=4).folder


def step(side: str, name: str) -> Any:
    return importlib.import_module(f"{side}.{name}")


def adapted(side: str, base: Path, kind: str, targets: tuple[str, ...] = EVERYWHERE) -> Any:
    """A quantized model with LoRA on it; the seed makes the same A on both sides."""
    package = {"minigpt": minigpt, "hf_bridge": hf_bridge}[side]
    model = package.GPT.from_pretrained(base, dtype=torch.float32)
    step(side, "quant").quantize(model, kind, double_quant=kind == "nf4")
    generator = torch.Generator().manual_seed(3)
    step(side, "lora").adapt(model, rank=4, targets=targets, generator=generator)
    return model


def learn(model: nn.Module, ids: Tensor, steps: int = 20) -> float:
    """The last loss of some steps of AdamW on one batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        loss = loss_of(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """All that is no A or B: codes, scales and floats."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))


@KINDS
def test_from_the_same_start_both_sides_learn_the_same_a_and_b(
    base: Path, tmp_path: Path, ids: Tensor, kind: str
) -> None:
    files = []
    for side in SIDES:
        model = adapted(side, base, kind)
        first, last = loss_of(model.train()(ids), ids).item(), learn(model, ids)
        assert last < first - 0.3
        step(side, "lora").save(model, tmp_path / side)
        files.append(load_file(tmp_path / side / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert (tensor - files[1][name]).abs().max() <= TRAINED, name
        assert tensor.abs().max() > 0.01, f"{name} has learned nothing"


@BOTH
@KINDS
def test_only_a_and_b_train_and_the_codes_stay_as_they_were(
    base: Path, ids: Tensor, side: str, kind: str
) -> None:
    model = adapted(side, base, kind)
    model(ids)  # an evaluation before the training must change nothing either
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 4 * model.config.n_layer
    assert all("lora_A" in name or "lora_B" in name for name in names)
    before = frozen(model)
    learn(model, ids, steps=2)
    after = frozen(model)
    assert before.keys() == after.keys()
    assert [n for n, tensor in before.items() if not torch.equal(tensor, after[n])] == []
    codes = {torch.uint8, torch.int8} & {tensor.dtype for tensor in after.values()}
    assert codes, "the base is no longer quantized"


@BOTH
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_into_codes_is_refused_and_says_how(base: Path, side: str, kind: str) -> None:
    model = adapted(side, base, kind)
    before = frozen(model)
    with pytest.raises(
        ValueError,
        match=r"merging needs a float base, got .* which would round the sum: load the float "
        "model, lora.load the adapter onto it, and merge there",
    ):
        step(side, "lora").merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen(model).items())


@BOTH
def test_with_no_adapter_active_what_is_left_is_the_quantized_base(
    base: Path, ids: Tensor, side: str
) -> None:
    model = adapted(side, base, "nf4")
    learn(model, ids, steps=2)
    lora = step(side, "lora")
    lora.activate(model, None)
    expected = model(ids)
    lora.merge(model)
    assert torch.equal(model(ids), expected)
    assert not any("lora_" in name for name in model.state_dict())


@BOTH
def test_what_was_learned_over_codes_merges_into_the_float_base(
    base: Path, tmp_path: Path, ids: Tensor, side: str
) -> None:
    model = adapted(side, base, "nf4")
    learned = learn(model, ids)
    step(side, "lora").save(model, tmp_path / "adapter")
    for other in SIDES:  # whichever side loads it
        package = {"minigpt": minigpt, "hf_bridge": hf_bridge}[other]
        plain = package.GPT.from_pretrained(base, dtype=torch.float32)
        start = loss_of(plain(ids), ids).item()
        step(other, "lora").load(plain, tmp_path / "adapter")
        apart = plain(ids)
        # The float base is a little off the codes that A and B were learned beside.
        assert loss_of(apart, ids).item() == pytest.approx(learned, abs=0.1)
        assert learned < start - 0.3
        step(other, "lora").merge(plain)
        assert (plain(ids) - apart).abs().max() < 1e-4  # float32
        plain.save_pretrained(tmp_path / f"{side}-{other}")
    first, second = (load_file(tmp_path / f"{side}-{o}" / "model.safetensors") for o in SIDES)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def quantized_chat(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: minigpt.Tokenizer
) -> dict[str, Path]:
    """A model directory with a tokenizer, in floats and in NF4."""
    folder = tmp_path_factory.mktemp("quantized_chat")
    config = minigpt.GPTConfig(
        vocab_size=300,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=2,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = minigpt.GPT(config, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "float")
    quant = step("minigpt", "quant")
    quant.save(quant.quantize(model, "nf4", double_quant=True), folder / "nf4")
    for kind in ("float", "nf4"):
        tokenizer.save_pretrained(folder / kind)
    pairs = [{"prompt": "¿Qué tal?", "completion": "Hola, hola"}] * 12
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return {name: folder / name for name in ("float", "nf4", "pairs.jsonl")}


def finetune(side: str, files: dict[str, Path], output: Path, *flags: str) -> int:
    words = ["finetune", "--model", str(files["nf4"]), "--data", str(files["pairs.jsonl"])]
    words += ["--output", str(output), "--max-steps", "4", "--batch-size", "4", *flags]
    return step(side, "__main__").main([*words, "--learning-rate", "1e-2"])


def test_finetune_over_codes_writes_an_adapter_with_the_same_losses_on_both_sides(
    quantized_chat: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = minigpt.GPT.from_pretrained(quantized_chat["float"])
    total = sum(p.numel() for p in plain.parameters())
    added = 2 * 8 * (64 + 192)
    seen = []
    for side in SIDES:
        assert finetune(side, quantized_chat, tmp_path / side) == 0
        told = capsys.readouterr().err
        assert f"training {added:,} of {total + added:,} parameters" in told
        assert f"wrote {tmp_path / side / 'best'}, perplexity" in told
        assert ": merge it into the float model" in told
        assert not (tmp_path / side / "model.safetensors").exists()
        lines = (tmp_path / side / "log.jsonl").read_text().splitlines()
        seen.append([r["loss"] for line in lines if "loss" in (r := json.loads(line))])
        assert seen[-1][-1] < seen[-1][0]
        assert finetune(side, quantized_chat, tmp_path / side, "--resume-from-checkpoint") == 0
        fresh = minigpt.GPT.from_pretrained(quantized_chat["float"])
        minigpt_lora = step("minigpt", "lora")
        minigpt_lora.load(fresh, tmp_path / side / "best")
        minigpt_lora.merge(fresh)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)  # float32: sums in another order


@BOTH
@pytest.mark.parametrize("method", ["full", "adapters"])
def test_what_trains_weights_themselves_is_refused_over_codes(
    quantized_chat: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: str,
    method: str,
) -> None:
    assert finetune(side, quantized_chat, tmp_path / "out", "--method", method) == 2
    assert capsys.readouterr().err == (
        f"finetune: --method {method} needs a float model, and {quantized_chat['nf4']} is "
        "quantized: use --method lora, or the float model\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_correction_stays_in_float32_beside_codes(base: Path) -> None:
    model = adapted("minigpt", base, "nf4")
    layer = model.h[0].attn.c_attn
    assert isinstance(layer.base, Linear4bit)
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}


@BOTH
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "finetune: rank must be a whole number of at least 1, got 0\n"),
        (["--alpha", "-1"], "finetune: alpha must be a number above 0, got -1.0\n"),
        (["--targets", "c_attn", "c_atn"], "or attn.c_proj and so on, got 'c_atn'\n"),
    ],
)
def test_finetune_says_what_makes_no_adapter(
    quantized_chat: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: str,
    flags: list[str],
    message: str,
) -> None:
    assert finetune(side, quantized_chat, tmp_path / "out", *flags) == 2
    assert capsys.readouterr().err.endswith(message)
    assert not (tmp_path / "out").exists()
