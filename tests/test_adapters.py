"""Step 12: bottleneck adapters compute the paper's equation, train alone, and travel in a file."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from parity import assert_close
from parity_lora import Base, adapted_pair, check_adapters, loss_of, new_base, wide_adapters
from safetensors.torch import load_file, save_file

import chatbot.__main__
import hf_bridge.__main__
import minigpt.__main__
from hf_bridge import adapters as bridge
from minigpt import GPT, GPTConfig, WeightsError, adapters, lora
from minigpt.files import copy_texts

IDS = torch.arange(20)[None]
SIDES = ((GPT, adapters), (hf_bridge.GPT, bridge))
CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck_model.safetensors"


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
    return GPT.from_pretrained(base.folder, dtype=torch.float64)


@pytest.fixture
def saved(model: GPT, tmp_path: Path) -> Path:
    """Wide adapters of width 5."""
    wide_adapters(model, width=5)
    adapters.save(model, tmp_path / "saved")
    return tmp_path / "saved"


def train(model: torch.nn.Module, steps: int) -> list[float]:
    """A few steps of AdamW on one batch; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = loss_of(model(IDS), IDS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_compute_the_equation_after_attention_and_mlp(base: Base) -> None:
    check_adapters(base)


def test_a_fresh_adapter_is_nearly_the_identity(model: GPT) -> None:
    before = model(IDS)
    adapters.adapt(model, width=16, generator=torch.Generator().manual_seed(0))
    change = (model(IDS) - before).abs().max()
    assert 0 < change < 1e-2 * before.abs().max()


def test_an_adapter_whose_second_matrix_is_zero_is_the_identity(model: GPT) -> None:
    before = model(IDS)
    for adapter in wide_adapters(model, width=16):
        for parameter in adapter.up.parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(model(IDS), before)


def test_fresh_weights_are_those_of_the_paper(model: GPT) -> None:
    adapters.adapt(model, width=64, generator=torch.Generator().manual_seed(0))
    adapter = model.h[0].attn.resid_dropout
    for layer in (adapter.down, adapter.up):
        assert not layer.bias.any()
        assert layer.weight.abs().max() <= 0.02
        assert layer.weight.std().item() == pytest.approx(0.0088, rel=0.05)  # cut at two sigma


def test_adapters_take_the_mode_of_the_model(base: Base) -> None:
    for side, step in SIDES:
        for training in (False, True):
            model = side.from_pretrained(base.folder).train(training)
            step.adapt(model, width=4)
            assert all(module.training == training for module in model.modules())


def test_the_base_keeps_its_parameters_names(model: GPT) -> None:
    before = model.state_dict()
    adapters.adapt(model, width=4)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("layer_norms", [False, True])
def test_only_adapters_and_perhaps_layer_norms_train(base: Base, layer_norms: bool) -> None:
    for side, step in SIDES:
        model = side.from_pretrained(base.folder, dtype=torch.float64)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        step.adapt(model, width=16, layer_norms=layer_norms, generator=generator)
        losses = train(model, steps=20)
        assert losses[-1] < losses[0] - 0.3
        changed = {n for n, p in model.named_parameters() if n in before and (p != before[n]).any()}
        assert changed == {name for name in before if layer_norms and ".ln_" in f".{name}"}
        new = {n: p for n, p in model.named_parameters() if n not in before}
        assert len(new) == 3 * 2 * 4  # three blocks, two adapters, two matrices and two biases
        assert all(parameter.requires_grad for parameter in new.values())


@pytest.mark.parametrize("layer_norms", [False, True])
def test_both_sides_train_alike_and_load_each_others_files(
    base: Base, tmp_path: Path, layer_norms: bool
) -> None:
    logits = []
    for side, step in SIDES:
        model = side.from_pretrained(base.folder, dtype=torch.float64)
        generator = torch.Generator().manual_seed(3)
        step.adapt(model, width=4, layer_norms=layer_norms, generator=generator)
        train(model, steps=10)
        step.save(model, tmp_path / step.__name__)
        logits.append(model(IDS))
    assert_close(logits[0], logits[1], 1e-8)
    for side, step in SIDES:
        for _, other in SIDES:
            model = side.from_pretrained(base.folder, dtype=torch.float64)
            step.load(model, tmp_path / other.__name__)
            assert_close(model(IDS), logits[0], 1e-8)
            assert not any(parameter.requires_grad for parameter in model.parameters())


def test_saving_what_was_loaded_changes_no_byte(base: Base, saved: Path, tmp_path: Path) -> None:
    model = GPT.from_pretrained(base.folder, dtype=torch.float64)
    adapters.load(model, saved, trainable=True)
    adapters.save(model, tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 24


def test_the_table_counts_what_trains_in_gpt2_small() -> None:
    rows = adapters.parameter_table(GPTConfig(), rank=4, targets=("c_attn", "c_proj"), width=32)
    C, layers, full = 768, 12, 124_439_808
    rank = 4 * (C + 3 * C) + 4 * (C + C) + 4 * (4 * C + C)  # c_attn, attn.c_proj, mlp.c_proj
    bottleneck = 2 * (2 * C * 32 + 32 + C)
    norms = (2 * layers + 1) * 2 * C
    assert [tuple(row) for row in rows] == [
        ("full", full, full),
        ("LoRA", layers * rank, full + layers * rank),
        ("adapters", layers * bottleneck, full + layers * bottleneck),
        ("adapters + layer norms", layers * bottleneck + norms, full + layers * bottleneck),
    ]


def test_pefts_own_count_agrees_with_the_table() -> None:
    settings = {"rank": 3, "targets": ("c_attn", "c_fc"), "width": 7}
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}
    config = hf_bridge.GPTConfig(**sizes, bos_token_id=None, eos_token_id=None)
    rows = adapters.parameter_table(GPTConfig(**sizes), **settings)
    assert [tuple(row) for row in rows] == [
        tuple(row) for row in bridge.parameter_table(config, **settings)
    ]
    model = hf_bridge.GPT(config)
    hf_bridge.lora.adapt(model, rank=3, targets=("c_attn", "c_fc"))
    assert rows[1][1:] == model.hf.get_nb_trainable_parameters()


def test_lora_finds_its_layers_in_a_model_with_adapters(model: GPT, tmp_path: Path) -> None:
    wide_adapters(model, width=4)
    before = model(IDS)
    lora.adapt(model, targets=("c_attn", "attn.c_proj", "mlp.c_proj"))
    assert torch.equal(model(IDS), before)
    lora.save(model, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.transformer.h.2.mlp.c_proj.lora_B.weight" in names


# Bad input


def test_a_width_of_zero_and_second_adapters_are_refused(base: Base) -> None:
    for side, step in SIDES:
        model = side.from_pretrained(base.folder)
        with pytest.raises(ValueError, match="width must be a whole number of at least 1, got 0"):
            step.adapt(model, width=0)
        with pytest.raises(ValueError, match="the model has no bottleneck adapters: adapt it or"):
            step.save(model, "nowhere")
        step.adapt(model, width=4)
        with pytest.raises(ValueError, match="the model has bottleneck adapters already"):
            step.adapt(model, width=4)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def configured(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_text(text)


def replaced(key: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = {**load_file(folder / WEIGHTS), key: tensor}
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / WEIGHTS)

    return spoil


KEY = "h.0.attn.resid_dropout.up.weight"
SPOILED = [
    (without(CONFIG), f"{CONFIG} is missing: "),
    (without(WEIGHTS), f"{WEIGHTS} is missing: "),
    (truncated, "incomplete metadata, file not fully covered"),
    (configured('{"width": 6}'), "down.bias must be (6,) on this base, got (5,)"),
    (configured('{"width": 0}'), "width must be a whole number of at least 1, got 0"),
    (configured('{"size": 5}'), "unexpected keyword argument 'size'"),
    (configured("[]"), "'list' object is not a mapping"),
    (configured("width: 5"), f"{CONFIG} is not valid JSON"),
    (configured('{"width": 5, "layer_norms": true}'), "h.0.ln_1.bias is missing: its layer would"),
    (replaced(KEY, None), f"{KEY} is missing: its layer would compute as the base does"),
    (replaced(KEY, torch.zeros(64, 5)), f"{KEY} must be (48, 5) on this base, got (64, 5)"),
    (replaced(KEY, torch.full((48, 5), torch.nan)), f"{KEY} must hold finite numbers, got NaN"),
    (replaced("h.3.mlp.dropout.up.bias", torch.zeros(48)), "h.3.mlp.dropout.up.bias is expected"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED, ids=[text[:40] for _, text in SPOILED])
def test_a_spoiled_file_is_refused_and_changes_nothing(
    base: Base, saved: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(saved)
    for (side, step), error in zip(SIDES, (WeightsError, hf_bridge.WeightsError)):
        model = side.from_pretrained(base.folder)
        before = str(model)
        with pytest.raises(error, match=re.escape(message)):
            step.load(model, saved)
        assert str(model) == before


def test_adapters_of_another_base_are_refused_by_name(base: Base, tmp_path: Path) -> None:
    model = GPT.from_pretrained(base.folder)
    adapters.adapt(model, width=4)
    adapters.save(model, tmp_path, base_model="org/base")
    for side, step in SIDES:
        other = side.from_pretrained(base.folder)
        before = str(other)
        with pytest.raises(ValueError, match="made for the base 'org/base', not 'gpt2': give that"):
            step.load(other, tmp_path, base_model="gpt2")
        assert str(other) == before
        step.load(other, tmp_path, base_model="elsewhere/base")


def test_a_base_that_was_called_a_dot_has_a_name_elsewhere(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    for side, step in SIDES:
        monkeypatch.chdir(tmp_path / "base")
        model = side.from_pretrained(base.folder)
        step.adapt(model, width=4)
        step.save(model, tmp_path / "adapter", base_model=".")
        monkeypatch.chdir(tmp_path)
        step.load(side.from_pretrained(base.folder), "adapter", base_model="elsewhere/base")


def test_either_kind_is_known_by_its_files(base: Base, saved: Path, tmp_path: Path) -> None:
    wide = adapted_pair(base).ours
    lora.save(wide, tmp_path / "lora")
    bottleneck = GPT.from_pretrained(base.folder, dtype=torch.float64)
    adapters.load(bottleneck, saved)
    for side, step in SIDES:
        for folder, expected in ((saved, bottleneck), (tmp_path / "lora", wide)):
            model = side.from_pretrained(base.folder, dtype=torch.float64)
            step.load_either(model, folder)
            assert_close(model(IDS), expected(IDS))
        with pytest.raises(ValueError, match="holds no adapter: adapter_"):
            step.load_either(side.from_pretrained(base.folder), base.folder)
        (tmp_path / "lora" / "adapter_config.json").rename(tmp_path / "kept")
        with pytest.raises(ValueError, match=r"adapter_config\.json is missing: an adapter's"):
            step.load_either(side.from_pretrained(base.folder), tmp_path / "lora")
        (tmp_path / "kept").rename(tmp_path / "lora" / "adapter_config.json")


def strong(chat_model: Path, folder: Path) -> dict[str, Path]:
    """Adapters of both kinds that change the replies, and what LoRA merged into the model is."""
    generator = torch.Generator().manual_seed(0)
    for kind, step in (("lora", lora), ("bottleneck", adapters)):
        model = GPT.from_pretrained(chat_model)
        step.adapt(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        step.save(model, folder / kind, base_model=str(chat_model))
        if kind == "lora":
            lora.merge(model)
            model.save_pretrained(folder / "merged")
            copy_texts(chat_model, folder / "merged")
    return {path.name: path for path in folder.iterdir()}


GREEDY = "--temperature 0 --max-new-tokens 12"
COMMANDS = {
    "minigpt generate": (minigpt.__main__.main, f"generate --prompt Hola {GREEDY}"),
    "hf_bridge generate": (hf_bridge.__main__.main, f"generate --prompt Hola {GREEDY}"),
    "placed": (hf_bridge.__main__.main, f"generate --prompt Hola --device-map cpu {GREEDY}"),
    "chatbot": (chatbot.__main__.main, f"-p Hola {GREEDY}"),
    "chatbot hf": (chatbot.__main__.main, f"-p Hola --engine hf {GREEDY}"),
    "minigpt eval": (minigpt.__main__.main, "eval --data text.txt --max-length 64"),
    "hf_bridge eval": (hf_bridge.__main__.main, "eval --data text.txt --max-length 64"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_an_adapter_as_if_it_were_merged(
    command: str,
    chat_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = strong(chat_model, tmp_path / "saved")
    (tmp_path / "text.txt").write_text("¿Qué es la caché KV? Hola, ¿qué tal?", "utf-8")
    monkeypatch.chdir(tmp_path)
    main, line = COMMANDS[command]

    def told(*flags: object) -> str:
        assert main([*line.split(), *map(str, flags)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    base, merged = told("--model", chat_model), told("--model", saved["merged"])
    beside = told("--model", chat_model, "--adapter", saved["lora"])
    bottleneck = told("--model", chat_model, "--adapter", saved["bottleneck"])
    if "eval" in command:
        loss = float(merged.split()[1])
        assert float(beside.split()[1]) == pytest.approx(loss, rel=1e-4)  # float32
    else:
        assert beside == merged
    assert len({base, merged, bottleneck}) == 3, "an adapter changed nothing"
    for kind in ("lora", "bottleneck"):
        words = ["--model", str(saved["merged"]), "--adapter", str(saved[kind])]
        assert main([*line.split(), *words]) == 2
        assert "made for the base '" in capsys.readouterr().err


def test_weights_that_are_nan_are_not_saved(base: Base, tmp_path: Path) -> None:
    for side, step in SIDES:
        model = side.from_pretrained(base.folder)
        step.adapt(model, width=4)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        with pytest.raises(ValueError, match="must hold finite numbers, got NaN or infinity"):
            step.save(model, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
