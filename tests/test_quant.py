"""Step 10: codes, statistics, products and files are bitsandbytes', bit for bit where it stores."""

import importlib
import io
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_quant import (
    SETTINGS,
    Checkpoint,
    check_4bit,
    check_files,
    check_int8_codes,
    check_int8_forward,
    check_logits,
    guarded,
    matrices,
)
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GPT2LMHeadModel

import hf_bridge
from hf_bridge import lora as bridge_lora
from hf_bridge import quant as bridge
from minigpt import GPT, GPTConfig, WeightsError, generate, lora, quant
from minigpt.attention import Conv1D
from minigpt.quant_linear import Linear4bit, Linear8bit

IDS = [" ".join(map(str, settings.values())) for settings in SETTINGS]
EVERY = pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
SIDES = pytest.mark.parametrize("side", ["minigpt", "hf_bridge"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower in two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("checkpoint"))


def load(side: str, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """The model of one side, and its step 10."""
    package, step = (GPT, quant) if side == "minigpt" else (hf_bridge.GPT, bridge)
    return package.from_pretrained(folder, **settings), step


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes_bit_for_bit_in_210_matrices(kind: str) -> None:
    assert check_4bit(kind) == len(list(matrices())) == 210


def test_eight_bits_are_bitsandbytes_bit_for_bit_in_210_matrices() -> None:
    assert check_int8_codes() == 210


@pytest.mark.parametrize("threshold", [6.0, 3.0])
def test_products_of_eight_bits_with_outliers_are_bitsandbytes(threshold: float) -> None:
    check_int8_forward(threshold)


@EVERY
def test_a_quantized_models_logits_are_those_of_transformers(
    checkpoint: Checkpoint, settings: dict[str, Any]
) -> None:
    check_logits(checkpoint, **settings)


@EVERY
def test_files_are_equal_and_load_in_transformers_without_a_word(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_files(checkpoint, tmp_path, **settings)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_either_side_loads_what_the_other_saved(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    for side in ("minigpt", "hf_bridge"):
        model, step = load(side, checkpoint.folder, dtype=dtype)
        step.save(step.quantize(model, **settings), tmp_path / side)
    one, other = (load_file(p / "model.safetensors") for p in sorted(tmp_path.iterdir()))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    configs = [json.loads((p / "config.json").read_text()) for p in sorted(tmp_path.iterdir())]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    logits = []
    for side, folder in (("minigpt", "hf_bridge"), ("hf_bridge", "minigpt")):
        model, _ = load(side, tmp_path / folder, dtype=torch.float32)
        assert not any(p.requires_grad for p in model.parameters())
        logits.append(model(checkpoint.ids))
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


@EVERY
def test_what_was_saved_computes_the_same_again(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = checkpoint.ours(**settings)
    quant.save(model, tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(checkpoint.ids), model(checkpoint.ids))
    quant.save(again, tmp_path / "again")
    first, second = ((p / "model.safetensors").read_bytes() for p in (tmp_path, tmp_path / "again"))
    assert first == second


@torch.no_grad()
def test_layers_that_were_left_in_floats_stay_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "c_fc"],
    )
    theirs = GPT2LMHeadModel.from_pretrained(
        checkpoint.folder, dtype=torch.float32, quantization_config=settings
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert isinstance(ours.h[0].mlp.c_fc, Conv1D) and isinstance(ours.h[0].attn.c_attn, Linear4bit)
    quant.save(ours, tmp_path / "ours")
    again, report = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    mask = torch.ones_like(checkpoint.ids)
    expected = guarded(theirs)(checkpoint.ids, attention_mask=mask).logits
    assert torch.equal(guarded(again)(checkpoint.ids, attention_mask=mask).logits, expected)
    assert (ours(checkpoint.ids) - expected).abs().max() < 1e-5
    bridged = hf_bridge.GPT.from_pretrained(tmp_path / "ours")
    assert (bridged(checkpoint.ids) - expected).abs().max() < 1e-5


@EVERY
def test_dequantizing_gives_a_plain_model_of_the_same_numbers(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    found = []
    for side in ("minigpt", "hf_bridge"):
        model, step = load(side, checkpoint.folder, dtype=torch.float32)
        plain = step.dequantize(step.quantize(model, **settings))
        plain.save_pretrained(tmp_path / side)
        found.append(load_file(tmp_path / side / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert isinstance(GPT.from_pretrained(tmp_path / "minigpt").h[0].attn.c_attn, Conv1D)


@SIDES
def test_a_plain_model_has_nothing_to_dequantize(checkpoint: Checkpoint, side: str) -> None:
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert step.dequantize(model) is model
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_the_bridge_dequantizes_no_model_with_lora(checkpoint: Checkpoint) -> None:
    model = hf_bridge.GPT.from_pretrained(checkpoint.folder, dtype=torch.float32)
    bridge.quantize(model)
    bridge_lora.adapt(model, rank=2)
    with pytest.raises(ValueError, match="take off what wraps its layers, or merge it into"):
        bridge.dequantize(model)


def test_what_is_few_or_felt_everywhere_stays_float(checkpoint: Checkpoint) -> None:
    before = GPT.from_pretrained(checkpoint.folder, dtype=torch.float32)
    model = checkpoint.ours(kind="nf4")
    kinds = {
        type(m) for p, m in model.h.named_modules() if p.endswith(("c_attn", "c_proj", "c_fc"))
    }
    assert kinds == {Linear4bit}
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        if not name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            assert torch.equal(after[name], parameter), name
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_change_of_dtype_leaves_codes_and_scales_alone(checkpoint: Checkpoint, kind: str) -> None:
    model, same = checkpoint.ours(kind=kind), checkpoint.ours(kind=kind)
    model.half().float()
    for layer, other in zip(model.h[0].modules(), same.h[0].modules()):
        for (name, ours), theirs in zip(
            layer.named_buffers(), dict(other.named_buffers()).values()
        ):
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name


def test_more_bits_are_nearer(checkpoint: Checkpoint) -> None:
    float_ = GPT.from_pretrained(checkpoint.folder, dtype=torch.float32)
    weight = float_.h[0].mlp.c_fc.weight
    errors = []
    for kind in ("int8", "nf4", "fp4"):
        layer = checkpoint.ours(kind=kind).h[0].mlp.c_fc
        errors.append((layer.dequantize().T - weight).square().mean().sqrt() / weight.std())
    assert errors[0] < 0.01 < errors[1] < 0.1 < errors[2] < 0.15  # in standard deviations


def test_eight_bits_dequantize_while_they_train(checkpoint: Checkpoint) -> None:
    layer = checkpoint.ours(kind="int8").h[0].mlp.c_fc.train()
    assert isinstance(layer, Linear8bit)
    x = torch.randn(2, 3, 64, requires_grad=True)
    expected = x @ layer.dequantize().T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_quantized_model_generates_with_a_cache(checkpoint: Checkpoint) -> None:
    model = checkpoint.ours(kind="nf4", double_quant=True)
    ids = checkpoint.ids[:1, :8]
    continued = generate(model, ids, max_new_tokens=6, temperature=0)
    for T in range(8, 14):
        assert continued[0, T] == model(continued[:, :T])[0, -1].argmax()


@pytest.mark.slow
def test_gpt2_small_in_nf4_is_at_most_half_of_its_float16_file(tmp_path: Path) -> None:
    model = GPT(GPTConfig(), generator=torch.Generator().manual_seed(0)).half()
    model.save_pretrained(tmp_path / "half")
    quant.save(quant.quantize(model, "nf4", double_quant=True), tmp_path / "nf4")
    half, nf4 = ((tmp_path / d / "model.safetensors").stat().st_size for d in ("half", "nf4"))
    assert nf4 <= half / 2, f"{nf4 / 1e6:.1f} of {half / 1e6:.1f} MB"


@SIDES
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "int4"}, "kind must be one of nf4, fp4, int8, got 'int4'"),
        ({"block_size": 65}, "block_size must be .*got 65"),
        ({"kind": "int8", "double_quant": True}, "are for 4 bits: int8 scales whole rows"),
        ({"kind": "int8", "threshold": -1.0}, "threshold must be a number of 0 or more, got -1"),
        ({"kind": "int8", "threshold": float("nan")}, "threshold must be .* got nan"),
    ],
)
def test_settings_that_are_none_are_refused(
    checkpoint: Checkpoint, side: str, settings: dict[str, Any], message: str
) -> None:
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        step.quantize(model, **settings)


@SIDES
def test_models_that_are_no_plain_floats_are_refused(checkpoint: Checkpoint, side: str) -> None:
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    with pytest.raises(ValueError, match="the model is not quantized: quantize it first"):
        step.save(model, checkpoint.folder / "never")
    step.quantize(model)
    with pytest.raises(ValueError, match="the model is quantized already: quantize the float"):
        step.quantize(model)
    wide, step = load(side, checkpoint.folder, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float32, float16, bfloat16, got wte.weight in .*64"):
        step.quantize(wide)


@SIDES
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(
    checkpoint: Checkpoint, side: str, wrong: float
) -> None:
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    parameter = dict(model.named_parameters())
    name = next(n for n in parameter if n.endswith("h.1.mlp.c_fc.weight"))
    with torch.no_grad():
        parameter[name][3, 4] = wrong
    with pytest.raises(ValueError, match=r"got NaN or infinity in h\.1\.mlp\.c_fc\.weight"):
        step.quantize(model)


def test_adapted_models_are_refused(checkpoint: Checkpoint) -> None:
    model = GPT.from_pretrained(checkpoint.folder, dtype=torch.float32)
    lora.adapt(model, rank=2)
    with pytest.raises(ValueError, match=r"holds h\.0\.attn\.c_attn\..*: take off what wraps"):
        quant.quantize(model)


def test_shapes_that_bitsandbytes_unpacks_wrongly_are_refused(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=96, n_layer=1, n_head=2)
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "float")
    twin = hf_bridge.GPT.from_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn has 96 inputs, no multiple of .* 64"):
        bridge.quantize(twin)
    quant.quantize(model)  # ours computes rightly, but the file would be misread
    with pytest.raises(ValueError, match="96 inputs are no multiple of the block size 64"):
        quant.save(model, tmp_path / "codes")
    assert not (tmp_path / "codes" / "model.safetensors").exists()


def damage(folder: Path, change: Any) -> None:
    """Change a saved model's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer.h.0.attn.c_attn.weight.absmax"),
            "codes that bitsandbytes did not write",
        ),
        (
            lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"),
            r"tensors missing: h\.1\.mlp\.c_fc\.bias",
        ),
        (
            lambda t: t.update({"transformer.h.9.x": torch.ones(1)}),
            r"tensors unknown to GPT-2: h\.9\.x",
        ),
    ],
)
def test_damaged_files_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: Any, message: str
) -> None:
    quant.save(checkpoint.ours(kind="nf4"), tmp_path)
    damage(tmp_path, change)
    with pytest.raises(WeightsError, match=message):
        GPT.from_pretrained(tmp_path)


C_ATTN = "transformer.h.0.attn.c_attn."
STATE = C_ATTN + "weight.quant_state.bitsandbytes__nf4"


def shorter(name: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[C_ATTN + name] = tensors[C_ATTN + name][:-1].clone()

    return change


def restated(**settings: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = {**json.loads(bytes(tensors[STATE].tolist())), **settings}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def in_columns(tensors: dict[str, torch.Tensor]) -> None:
    tensors[C_ATTN + "weight_format"] += 1


@pytest.mark.parametrize(
    ("kind", "change", "message", "alone"),  # 192 x 64 weights; alone: transformers does not look
    [
        ("nf4", shorter("weight"), "c_attn.weight must be 6144 numbers in torch.uint8, got", False),
        (
            "nf4",
            shorter("weight.absmax"),
            "weight.absmax must be 192 numbers in .*int8, got",
            False,
        ),
        (
            "nf4",
            shorter("weight.nested_absmax"),
            "nested_absmax must be 1 numbers in .*, got",
            True,
        ),
        ("nf4", restated(quant_type="int3"), "quant_type must be nf4 or fp4, got 'int3'", False),
        (
            "nf4",
            restated(shape=[64, 192]),
            r"c_attn.weight is \(192, 64\), config.json says",
            False,
        ),
        (
            "nf4",
            restated(blocksize=128),
            "absmax must be 96 numbers in torch.uint8, got 192",
            False,
        ),
        ("nf4", restated(nested_blocksize=64), "nested_blocksize must be 256, got 64", True),
        ("int8", shorter("SCB"), "SCB must be 192 numbers in torch.float32, got 191", False),
        ("int8", in_columns, "weight_format must be 0, row by row, got 1", True),
    ],
)
def test_codes_and_scales_of_other_sizes_are_refused_before_they_compute(
    checkpoint: Checkpoint, tmp_path: Path, kind: str, change: Any, message: str, alone: bool
) -> None:
    quant.save(checkpoint.ours(kind=kind, double_quant=kind == "nf4"), tmp_path)
    damage(tmp_path, change)
    with pytest.raises(WeightsError, match=message) as told:
        GPT.from_pretrained(tmp_path)
    assert "h.0.attn.c_attn" in str(told.value)
    if not alone:
        with pytest.raises(hf_bridge.WeightsError, match=r"the parts of h\.0\.attn\.c_attn do not"):
            hf_bridge.GPT.from_pretrained(tmp_path)


@SIDES
def test_floats_that_are_said_to_be_codes_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, side: str
) -> None:
    quant.save(checkpoint.ours(kind="nf4"), tmp_path)
    shutil.copyfile(checkpoint.folder / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds no codes: config|parts of h\.0\.attn\.c_attn do not"
    ):
        load(side, tmp_path)


@SIDES
def test_settings_in_a_file_are_blamed_for_themselves(
    checkpoint: Checkpoint, tmp_path: Path, side: str
) -> None:
    quant.save(checkpoint.ours(kind="int8"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_threshold"] = "x"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"bitsandbytes did not write: .*float") as told:
        load(side, tmp_path)
    assert "safetensors" not in str(told.value)


@SIDES
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # conftest.py turns them off
def test_a_terminal_shows_a_bar_and_a_file_does_not(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, side: str, seen: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: seen, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    step.quantize(model)
    assert ("100%" in screen.getvalue()) == seen
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    screen.truncate(0)
    step.quantize(model, progress=False)
    assert not screen.getvalue()


@SIDES
def test_another_way_of_quantizing_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, side: str
) -> None:
    quant.save(checkpoint.ours(kind="nf4"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quant_method must be bitsandbytes, got 'gptq'"):
        load(side, tmp_path)


@SIDES
def test_a_quantized_model_is_not_saved_as_a_plain_one(
    checkpoint: Checkpoint, tmp_path: Path, side: str
) -> None:
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    step.quantize(model)
    with pytest.raises(ValueError, match=r"only a plain GPT .*h\.0.* by its own step: quant\.save"):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@SIDES
def test_a_full_disk_leaves_the_old_codes_whole(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    model, step = load(side, checkpoint.folder, dtype=torch.float32)
    step.save(step.quantize(model), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        step.save(step.quantize(step.dequantize(model), "int8"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@SIDES
@pytest.mark.parametrize("bits", [["4", "--double-quant"], ["4", "--quant-type", "fp4"], ["8"]])
def test_the_command_writes_a_model_that_both_sides_load(
    checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: str,
    bits: list[str],
) -> None:
    main = _main(side)
    flags = ["--model", str(checkpoint.folder), "--output", str(tmp_path / "q")]
    assert main(["quantize", *flags, "--bits", *bits, "--dtype", "float16"]) == 0
    assert "MB, " in capsys.readouterr().out
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "q")
    assert theirs.is_quantized
    assert GPT.from_pretrained(tmp_path / "q").wte.weight.dtype == torch.float16


@SIDES
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "3"], "--bits: invalid choice: 3"),
        (["--bits", "5"], "--bits: invalid choice: 5"),
        (["--bits", "4", "--output", ""], "quantize: --output must be a directory, got ''\n"),
        (["--bits", "4", "--output", "{model}/config.json"], "must be a directory, got '/"),
        (["--bits", "8", "--double-quant"], "--quant-type and --double-quant are for --bits 4"),
        (["--bits", "4", "--output", "{model}"], "--output must be another directory than --model"),
        (["--bits", "4", "--model", "./nowhere"], "no directory './nowhere'"),
    ],
)
def test_the_command_says_what_is_wrong(
    checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: str,
    flags: list[str],
    message: str,
) -> None:
    given = [flag.format(model=checkpoint.folder) for flag in flags]
    main = _main(side)
    arguments = ["--model", str(checkpoint.folder), "--output", str(tmp_path / "q"), *given]
    try:
        code = main(["quantize", *arguments])
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def _main(side: str) -> Any:
    return importlib.import_module(f"{side}.__main__").main
