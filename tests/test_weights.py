"""Step 7: every published layout loads, what we save transformers loads, and damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import Pair, assert_close, new_pair, small_config
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import hf_bridge
from minigpt import GPT, WeightsError

FORMAT = {"format": "pt"}


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    """A float32 checkpoint of one's own, to be spoilt."""
    GPT.from_pretrained(pair.folder).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", FORMAT)


def published(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def test_the_old_hub_layout_gives_the_same_logits(pair: Pair, folder: Path) -> None:
    tensors = {k.removeprefix("transformer."): v for k, v in published(folder).items()}
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    rewrite(folder, tensors)
    ids = pair.ids()
    assert_close(GPT.from_pretrained(folder, dtype=torch.float64)(ids), pair.expected(ids))


@torch.no_grad()
def test_shards_give_the_same_logits(pair: Pair, tmp_path: Path) -> None:
    pair.theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = pair.ids()
    assert_close(GPT.from_pretrained(tmp_path)(ids), pair.expected(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_files_precision_is_kept_unless_another_is_asked_for(
    pair: Pair, tmp_path: Path, dtype: torch.dtype
) -> None:
    GPT.from_pretrained(pair.folder, dtype=dtype).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {dtype}
    ours = GPT.from_pretrained(tmp_path, dtype=torch.float64)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    ids = pair.ids()
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_we_save_transformers_loads_whole(tmp_path: Path, tied: bool) -> None:
    pair = new_pair(tmp_path / "theirs", small_config(tie_word_embeddings=tied))
    pair.ours.save_pretrained(tmp_path / "ours")
    theirs, report = GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float64
    )
    assert not any(report.values())
    ids = pair.ids()
    with torch.no_grad():
        assert_close(pair.ours(ids), theirs(ids, attention_mask=torch.ones_like(ids)).logits)
        assert_close(pair.ours(ids), pair.expected(ids))


def test_a_tied_head_is_saved_once(folder: Path) -> None:
    assert "lm_head.weight" not in published(folder)


@torch.no_grad()
def test_a_head_of_its_own_is_used_whatever_the_config_says(pair: Pair, folder: Path) -> None:
    tensors = published(folder)
    other = tensors["transformer.wte.weight"] + 1
    rewrite(folder, {**tensors, "lm_head.weight": other})
    model = GPT.from_pretrained(folder)
    assert not model.config.tie_word_embeddings
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    ids = pair.ids()
    assert_close(model(ids), theirs(ids, attention_mask=torch.ones_like(ids)).logits, 1e-3)


MISSING = "transformer.h.1.attn.c_proj.weight"


def drop(folder: Path) -> None:
    tensors = published(folder)
    del tensors[MISSING]
    rewrite(folder, tensors)


def add(folder: Path) -> None:
    rewrite(folder, {**published(folder), "transformer.h.9.ln_1.weight": torch.ones(48)})


def reshape(folder: Path) -> None:
    tensors = published(folder)
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(folder, {**tensors, name: tensors[name].T})


def integers(folder: Path) -> None:
    tensors = published(folder)
    rewrite(folder, {**tensors, MISSING: tensors[MISSING].to(torch.int8)})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
    (folder / "model.safetensors").write_text(text)


def web_page(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<!DOCTYPE html><title>Sign in</title>" * 9)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def index_of(folder: Path, name: str) -> None:
    no_weights(folder)
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"has tensors missing: h\.1\.attn\.c_proj\.weight"),
        (add, r"has tensors unknown to GPT-2: h\.9\.ln_1\.weight"),
        (reshape, r"c_fc\.weight is \(192, 48\), config.json says \(48, 192\)"),
        (integers, r"that are no floats: h\.1\.attn\.c_proj\.weight"),
        (truncate, "is not a whole safetensors file .*: download it again"),
        (empty, "is not a whole safetensors file .*: download it again"),
        (lfs_pointer, "is a Git LFS pointer, not the weights: run `git lfs pull` there"),
        (web_page, "is a web page, not the weights: download it again"),
        (pickled_only, r"only pickled weights \(.bin\), which can run code: convert them"),
        (no_weights, "has no weights: model.safetensors is missing"),
        (lambda f: index_of(f, "../x.safetensors"), "must name files beside itself"),
        (lambda f: index_of(f, "a.safetensors"), "names files that are missing: a.safetensors"),
    ],
)
def test_damage_is_named(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("side", [GPT, hf_bridge.GPT], ids=["minigpt", "hf_bridge"])
def test_codes_are_no_weights_whatever_dtype_is_asked_for(folder: Path, side: type) -> None:
    integers(folder)
    for dtype in (None, torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="that are no floats: h"):
            side.from_pretrained(folder, dtype=dtype)


def test_a_failed_save_leaves_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = GPT.from_pretrained(folder)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


MEASURE = """
import resource, sys
from minigpt import GPT
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
GPT.from_pretrained(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_loading_takes_little_more_memory_than_the_file(tmp_path: Path) -> None:
    from minigpt import GPTConfig

    GPT(GPTConfig(n_layer=5)).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 250e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 1.3 * size


def test_a_file_of_several_dtypes_gets_the_one_that_holds_them_all(
    pair: Pair, tmp_path: Path
) -> None:
    GPT.from_pretrained(pair.folder, dtype=torch.float32).half().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "transformer.ln_f.weight"
    tensors[name] = tensors[name].float() + 1e-6  # float16 would round it away
    save_file(tensors, path, metadata={"format": "pt"})
    model = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.ln_f.weight, tensors[name])
    assert model(pair.ids(T=3)).isfinite().all()
