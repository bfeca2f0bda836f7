"""Step 11: LoRA's outputs, gradients, merges and files are peft's."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_close
from parity_lora import (
    EVERYWHERE,
    Base,
    adapted_pair,
    check_files,
    check_merge,
    check_outputs,
    check_seed,
    check_training,
    loss_of,
    new_base,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import hf_bridge
from hf_bridge import lora as bridge
from minigpt import GPT, WeightsError, lora
from minigpt.attention import Conv1D
from minigpt.low_rank import LoRAConfig, LowRank

SETTINGS: list[dict[str, Any]] = [
    {},
    {"rank": 1, "alpha": 0.5},
    {"rank": 3, "alpha": 16, "rslora": True},
    {"targets": ("c_proj",)},  # in attention and in the MLP
    {"targets": ("attn.c_proj",), "rank": 48},
    {"targets": ("c_fc", "h.1.attn.c_attn")},
    {"targets": EVERYWHERE, "dropout": 0.5},
]
SUBSETS = ["q", "k", "v", "qk", "qv", "kv"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower in two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return new_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base: Base) -> GPT:
    return GPT.from_pretrained(base.folder)


@pytest.fixture
def saved(base: Base, tmp_path: Path) -> Path:
    """An adapter of rank 8 for c_attn, with a B that is not zero."""
    lora.save(adapted_pair(base, torch.float32).ours, tmp_path / "saved", base_model="org/base")
    return tmp_path / "saved"


# What it computes


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_outputs_equal_pefts(base: Base, settings: dict[str, Any]) -> None:
    check_outputs(base, **settings)


@pytest.mark.parametrize("qkv", SUBSETS)
def test_every_choice_of_q_k_and_v_equals_peft_with_the_other_rows_zero(
    base: Base, qkv: str
) -> None:
    check_outputs(base, qkv=qkv)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_seed_draws_pefts_a(base: Base, settings: dict[str, Any]) -> None:
    check_seed(base, **settings)


def test_a_fresh_adapter_changes_nothing(model: GPT) -> None:
    ids = torch.arange(20)[None]
    before = model(ids)
    lora.adapt(model, targets=EVERYWHERE)
    assert torch.equal(model(ids), before)


def test_an_adapter_of_a_model_in_eval_mode_is_in_eval_mode(base: Base) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder)
        step.adapt(model, dropout=0.5)
        assert not any(module.training for module in model.modules())
        step.adapt(model.train(), dropout=0.5, name="second")
        assert all(module.training for module in model.modules())


def test_only_a_and_b_train(model: GPT) -> None:
    lora.adapt(model, targets=EVERYWHERE)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 4 * 3  # A and B of four layers in three blocks


def test_bfloat16_models_are_corrected_in_float32(base: Base) -> None:
    pair = adapted_pair(base, torch.bfloat16)
    assert {p.dtype for p in pair.ours.parameters() if p.requires_grad} == {torch.float32}
    layer = pair.ours.h[0].attn.c_attn
    theirs = pair.theirs.base_model.model.transformer.h[0].attn.c_attn
    x = torch.randn(4, 48).bfloat16()
    correction = theirs.lora_B["default"](theirs.lora_A["default"](x.float())) * 2.0
    assert torch.equal(layer(x), (layer.base(x) + correction).bfloat16())


# How it trains


@pytest.mark.parametrize(
    "settings",
    [{}, {"targets": EVERYWHERE, "rslora": True}, {"targets": EVERYWHERE, "dropout": 0.3}],
    ids=str,
)
def test_twenty_steps_of_adamw_lead_where_pefts_lead(base: Base, settings: dict[str, Any]) -> None:
    check_training(base, **settings)


@pytest.mark.parametrize("qkv", ["qv", "k"])
def test_only_the_chosen_thirds_of_c_attn_learn(base: Base, qkv: str, tmp_path: Path) -> None:
    trained = {}
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder, dtype=torch.float64)
        step.adapt(model, qkv=qkv, generator=torch.Generator().manual_seed(0))
        train(model, steps=5)
        step.save(model, tmp_path / step.__name__)
        trained[step] = load_file(tmp_path / step.__name__ / "adapter_model.safetensors")
    for name, B in trained[lora].items():
        assert_close(B, trained[bridge][name], 1e-8)
        if "lora_B" in name:
            for letter, third in zip("qkv", B.chunk(3)):
                assert third.any() == (letter in qkv)


def test_a_saved_choice_of_q_k_and_v_holds_when_training_goes_on(
    base: Base, tmp_path: Path
) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder)
        step.adapt(model, qkv="v")
        step.save(model, tmp_path)
        model = side.from_pretrained(base.folder)
        step.load(model, tmp_path, trainable=True)
        train(model, steps=2)
        step.save(model, tmp_path)
        B = load_file(tmp_path / "adapter_model.safetensors")[KEY.replace("lora_A", "lora_B")]
        assert [third.any().item() for third in B.chunk(3)] == [False, False, True]


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_merged_weights_equal_merge_and_unloads_bit_for_bit(
    base: Base, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    check_merge(base, dtype, **settings)


def test_a_merged_model_is_plain_and_computes_the_same(base: Base, tmp_path: Path) -> None:
    model = adapted_pair(base, targets=EVERYWHERE).ours
    ids = torch.arange(20)[None]
    expected = model(ids)
    lora.merge(model)
    assert all(type(block.attn.c_attn) is Conv1D for block in model.h)
    assert_close(model(ids), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path)(ids), model(ids))


def test_a_model_with_lora_is_not_saved_as_a_plain_one(base: Base, tmp_path: Path) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder)
        step.adapt(model)
        with pytest.raises(ValueError, match="only a plain GPT can be saved, this one holds "):
            model.save_pretrained(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_unmerge_gives_back_base_and_adapter_bit_for_bit(base: Base) -> None:
    model = adapted_pair(base, torch.float32).ours
    before = {name: p.clone() for name, p in model.state_dict().items()}
    lora.unmerge(model, lora.merge(model))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="the model holds LoRA layers: only a merged one can be"):
        lora.unmerge(model, dict(lora_layers(model)))


def test_merging_without_an_active_adapter_gives_the_base(base: Base) -> None:
    model = adapted_pair(base, torch.float32).ours
    lora.activate(model, None)
    lora.merge(model)
    plain = GPT.from_pretrained(base.folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_a_merged_model_cannot_be_merged_again(model: GPT) -> None:
    lora.adapt(model)
    lora.merge(model)
    for call in (lora.merge, lambda m: lora.activate(m, None), lambda m: lora.save(m, "x")):
        with pytest.raises(ValueError, match="the model holds no LoRA layers: adapt it or load"):
            call(model)


# Files, and several adapters


@pytest.mark.parametrize("settings", [*SETTINGS, {"qkv": "qv"}], ids=str)
def test_what_either_side_saves_the_other_loads_without_a_warning(
    base: Base, tmp_path: Path, settings: dict[str, Any]
) -> None:
    check_files(base, tmp_path, **settings)


def test_what_peft_saves_without_a_task_is_loaded_without_a_warning(
    base: Base, tmp_path: Path
) -> None:
    pair = base.pair()
    config = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    theirs = get_peft_model(pair.theirs, config)  # with no task it tells the base's class instead
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step.load(model, tmp_path)
        assert_close(model(ids), expected)


def test_saving_what_was_loaded_changes_no_byte(saved: Path, model: GPT, tmp_path: Path) -> None:
    lora.load(model, saved)
    lora.save(model, tmp_path / "again", base_model="org/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_loaded_adapters_are_switched_by_name(base: Base, tmp_path: Path) -> None:
    expected, ids = {}, torch.arange(20)[None]
    for name, settings in {"first": {}, "second": {"targets": ("c_fc",), "rank": 2}}.items():
        pair = adapted_pair(base, **settings)
        lora.save(pair.ours, tmp_path / name)
        expected[name] = pair.ours(ids)
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder, dtype=torch.float64)
        expected[None] = model(ids)
        for name in ("first", "second"):
            step.load(model, tmp_path / name, name=name)
            assert_close(model(ids), expected[name])
        for name in ("first", None, "second", "first"):
            step.activate(model, name)
            assert_close(model(ids), expected[name])
        step.save(model, tmp_path / "copy", name="second")
        copy = load_file(tmp_path / "copy" / "adapter_model.safetensors")
        original = load_file(tmp_path / "second" / "adapter_model.safetensors")
        assert all(torch.equal(copy[key], original[key]) for key in original | copy)
        with pytest.raises(
            ValueError, match="no adapter is named 'third': the model holds first, "
        ):
            step.activate(model, "third")


def test_a_loaded_adapter_trains_only_if_it_is_asked_to(saved: Path, base: Base) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        for trainable in (False, True):
            model = side.from_pretrained(base.folder)
            step.load(model, saved, trainable=trainable)
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            assert len(trained) == (6 if trainable else 0)
            step.activate(model, None)
            step.activate(model, "default")
            assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


def test_both_sides_give_the_same_tensors_in_the_same_calls(base: Base) -> None:
    ids, logits = torch.arange(20)[None], {}
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder, dtype=torch.float64)
        step.adapt(model, targets=EVERYWHERE, rank=2, generator=torch.Generator().manual_seed(4))
        train(model, steps=5)
        adapted = model(ids)
        removed = step.merge(model)
        merged = model(ids)
        step.unmerge(model, removed)
        unmerged = model(ids)
        step.activate(model, None)
        logits[step] = torch.cat([adapted, merged, unmerged, model(ids)])
    assert_close(logits[lora], logits[bridge], 1e-8)
    assert_close(logits[lora][1], logits[lora][0])


# Bad input

KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": -3}, "rank must be a whole number of at least 1, got -3"),
        ({"rank": 1.5}, "rank must be a whole number of at least 1, got 1.5"),
        ({"alpha": 0}, "alpha must be a number above 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0, got nan"),
        ({"dropout": 1.0}, "dropout must be a number in [0, 1), got 1.0"),
        ({"targets": ("c_atn", "c_fc", "wte")}, "attn.c_proj and so on, got 'c_atn', 'wte'"),
        ({"targets": ("attn",)}, "targets must be names of linear layers: c_attn, c_proj, c_fc"),
        ({"targets": ("lm_head",)}, "got 'lm_head'"),
        ({"targets": ()}, "attn.c_proj and so on, got none"),
        ({"targets": "c_attn"}, "targets must be several names, got the one string 'c_attn'"),
        ({"qkv": "qx"}, "qkv must be some of the letters q, k and v, got 'qx'"),
        ({"qkv": ""}, "qkv must be some of the letters q, k and v, got ''"),
        ({"qkv": "q", "targets": ("c_fc",)}, "within c_attn, which is no target, got qkv='q'"),
        ({"name": "a.b"}, "name must be a new word without dots, got 'a.b'"),
        ({"name": "training"}, "name must be a new word without dots, got 'training'"),
        ({"name": ""}, "name must be a new word without dots, got ''"),
    ],
    ids=str,
)
def test_what_makes_no_adapter_is_refused_and_changes_nothing(
    base: Base, settings: dict[str, Any], message: str
) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder)
        before = str(model)
        with pytest.raises(ValueError, match=re.escape(message)):
            step.adapt(model, **settings)
        assert str(model) == before
        assert all(p.requires_grad for p in model.parameters())


def test_a_name_is_given_once(base: Base) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder)
        step.adapt(model, name="chat")
        with pytest.raises(ValueError, match="name must be a new word without dots, got 'chat'"):
            step.adapt(model, name="chat", targets=("c_fc",))


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def configured(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def with_tensors(change: Any) -> Any:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(change(tensors), folder / "adapter_model.safetensors")

    return spoil


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): t for name, t in tensors.items()}


def without_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != KEY}


def with_a_fourth_block(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, KEY.replace("h.0", "h.3"): tensors[KEY].clone()}


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, KEY: torch.zeros(8, 64)}


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, KEY: torch.full((8, 48), torch.nan)}


def whole_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, KEY: torch.ones(8, 48, dtype=torch.int64)}


SPOILED = [
    (without_config, r"adapter_config.json is missing: an adapter's directory holds it and"),
    (without_weights, r"adapter_model.safetensors is missing: the adapter has no weights"),
    (pickled, r"holds only adapter_model.bin, a pickle, which can run code"),
    (truncated, r"adapter_model.safetensors is not a whole safetensors file"),
    (configured(peft_type="IA3"), r"peft_type must be LORA, got 'IA3'"),
    (configured(target_modules=["q_proj"]), r"names of linear layers.*got 'q_proj'"),
    (configured(target_modules=["c_attn", "c_fc"]), r"h.0.mlp.c_fc.lora_A(.weight)? is missing: "),
    (configured(target_modules=["c_fc"]), r"h.0.mlp.c_fc.lora_A(.weight)? is missing: its layer"),
    (configured(r=4), r"h.0.attn.c_attn.lora_A(.weight)? must be \(4, 48\) on this base, got"),
    (with_tensors(without_one), r"h.0.attn.c_attn.lora_A(.weight)? is missing: its layer would"),
    (with_tensors(with_a_fourth_block), r"h.3.attn.c_attn.lora_A(.weight)? is expected by no "),
    (with_tensors(wider), r"lora_A(.weight)? must be \(8, 48\) on this base, got \(8, 64\)"),
    (with_tensors(with_nan), r"c_attn.lora_A(.weight)? must hold finite numbers, got NaN"),
    (with_tensors(whole_numbers), r"c_attn.lora_A(.weight)? must hold finite numbers, got NaN"),
    (configured(target_modules="all-linear"), r"must be a list of names, got 'all-linear'"),
    (configured(init_lora_weights="pissa"), r"'pissa' may change the base's own weights"),
]


@pytest.mark.parametrize(
    ("spoil", "message"), SPOILED, ids=[message[-30:] for _, message in SPOILED]
)
def test_a_spoiled_adapter_is_refused_and_changes_nothing(
    base: Base, saved: Path, spoil: Any, message: str
) -> None:
    spoil(saved)
    for side, step, error in (
        (GPT, lora, WeightsError),
        (hf_bridge.GPT, bridge, hf_bridge.WeightsError),
    ):
        model = side.from_pretrained(base.folder)
        before = str(model)
        with pytest.raises(error, match=message):
            step.load(model, saved)
        assert str(model) == before


def test_keys_that_peft_would_skip_are_an_error(base: Base, saved: Path) -> None:
    with_tensors(without_prefix)(saved)
    ids = torch.arange(20)[None]
    with pytest.raises(WeightsError, match="peft would load nothing and answer as the base model"):
        lora.load(GPT.from_pretrained(base.folder), saved)
    with pytest.raises(hf_bridge.WeightsError, match=r"lora_A\.weight is missing: its layer would"):
        bridge.load(hf_bridge.GPT.from_pretrained(base.folder), saved)
    pair = base.pair()
    expected = pair.expected(ids)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        theirs = PeftModel.from_pretrained(pair.theirs, saved)
    assert torch.equal(theirs(ids, torch.ones_like(ids)).logits, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must be off here, got True"),
        ({"bias": "all"}, "bias must be off here, got 'all'"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save must be off here, got ['ln_f']"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern must be off here, got {'c_attn': 4}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' may change the base's own"),
        ({"target_modules": "all-linear"}, "target_modules must be a list of names, got 'all-"),
        ({"r": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"lora_alpha": -1}, "alpha must be a number above 0, got -1"),
        ({"lora_alpha": "16"}, "alpha must be a number above 0, got '16'"),
        ({"lora_dropout": None}, "dropout must be a number in [0, 1), got None"),
        ({"target_modules": [1]}, "attn.c_proj and so on, got 1"),
        ({"target_modules": None}, "target_modules must be a list of names, got None"),
        ({"lora_alpha": 0}, "alpha must be a number above 0, got 0"),
        ({"layers_to_transform": [0]}, "layers_to_transform must be off here, got [0]"),
        ({"exclude_modules": ["c_fc"]}, "exclude_modules must be off here, got ['c_fc']"),
        ({"unknown": 3}, "unknown must be off here, got 3"),
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_not_loaded(
    base: Base, saved: Path, changes: dict[str, Any], message: str
) -> None:
    configured(**changes)(saved)
    for side, step, error in (
        (GPT, lora, WeightsError),
        (hf_bridge.GPT, bridge, hf_bridge.WeightsError),
    ):
        model = side.from_pretrained(base.folder)
        before = str(model)
        with pytest.raises(error, match=re.escape(message)):
            step.load(model, saved)
        assert str(model) == before


def test_an_adapter_of_another_base_is_refused_by_name(base: Base, saved: Path) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        with pytest.raises(ValueError, match="made for the base 'org/base', not 'gpt2': give "):
            step.load(side.from_pretrained(base.folder), saved, base_model="gpt2")
        step.load(side.from_pretrained(base.folder), saved, base_model="elsewhere/base")


def test_a_base_is_known_by_its_directorys_name(
    base: Base, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path / "base")
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        step.load(side.from_pretrained(base.folder), saved, base_model=".")


def test_a_base_that_was_called_a_dot_has_a_name_elsewhere(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base" / "sub").mkdir(parents=True)
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        for inside, name in (("base", "."), ("base/sub", "..")):
            monkeypatch.chdir(tmp_path / inside)
            model = side.from_pretrained(base.folder)
            step.adapt(model)
            step.save(model, tmp_path / "adapter", base_model=name)
            monkeypatch.chdir(tmp_path)
            for known in ("base", "elsewhere/base"):
                step.load(side.from_pretrained(base.folder), "adapter", base_model=known)


def test_an_adapter_of_a_wider_base_is_refused_by_shape(saved: Path, tmp_path: Path) -> None:
    wider_base = new_base(tmp_path / "wider", n_embd=64)
    with pytest.raises(WeightsError, match=r"lora_A must be \(8, 64\) on this base, got \(8, 48\)"):
        lora.load(GPT.from_pretrained(wider_base.folder), saved)


def test_weights_that_are_nan_are_not_saved(base: Base, tmp_path: Path) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder)
        step.adapt(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="must hold finite numbers, got NaN or infinity"):
            step.save(model, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


def test_an_active_adapter_is_needed_to_save_without_a_name(base: Base, tmp_path: Path) -> None:
    for side, step in ((GPT, lora), (hf_bridge.GPT, bridge)):
        model = side.from_pretrained(base.folder)
        step.adapt(model)
        step.activate(model, None)
        with pytest.raises(ValueError, match="no adapter is named None: the model holds default"):
            step.save(model, tmp_path / "none")


def test_the_delta_is_the_forward_as_a_matrix() -> None:
    correction = LowRank(5, 6, LoRAConfig(rank=2), rows=torch.tensor([0, 1, 4, 5]))
    correction.lora_B.data.normal_()
    x = torch.randn(3, 5)
    torch.testing.assert_close(correction(x), x @ correction.delta().T)
    assert not correction(x)[:, 2:4].any()


def train(model: torch.nn.Module, steps: int) -> list[float]:
    """A few steps of AdamW on one batch; the losses."""
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = loss_of(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def lora_layers(model: GPT) -> list[tuple[str, lora.LoRALinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, lora.LoRALinear)]
