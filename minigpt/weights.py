"""Step 7: read a published GPT-2 checkpoint, and write one.

Our parameter names are the checkpoint's and our weights lie as it stores them, so reading is
three small repairs: strip the `transformer.` prefix, drop the causal-mask buffers of old files,
drop the head where it is the embedding.

Before: model.py.  After: sampler.py.  Twin: hf_bridge/weights.py.  Proof: tests/test_weights.py.
"""

import dataclasses
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt import config as config_step
from minigpt.config import GPTConfig
from minigpt.files import (
    WeightsError,
    read_json,
    resolve,
    save_tensors,
    weight_files,
    write_json,
)
from minigpt.model import GPT

# Old files carry the mask; `attn.c_attn.bias` is not one of them.
BUFFERS = (".attn.bias", ".attn.masked_bias")
HEAD = "lm_head.weight"
PREFIX = "transformer."


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """Build the model that config.json describes and fill it; ready for inference (eval mode).

    `dtype` None keeps the file's; of several, the one that holds them all. Each tensor is read
    once, straight into its place: memory stays near the file's size. Raises WeightsError for files
    that are missing, damaged, or of another model; a weight that the file lacks is an error, never
    a fresh random one.
    """
    folder = resolve(name_or_path)
    config = config_step.read(folder)
    if "quantization_config" in read_json(folder / "config.json"):
        from minigpt import quant  # step 10 reads codes in place of weights

        return quant.load(folder, dtype=dtype, device=device)
    tensors = read_tensors(folder, dtype=dtype, device=device)
    config = untie(config, tensors)
    with torch.device("meta"):
        model = GPT(config)
    check_tensors(model, tensors, folder)
    model.load_state_dict(level(tensors), assign=True)
    return model.eval()


def untie(config: GPTConfig, tensors: dict[str, Tensor]) -> GPTConfig:
    """Drop a head that is the embedding; where it is another, the config says so from now on."""
    head, wte = tensors.get(HEAD), tensors.get("wte.weight")
    if head is None or not config.tie_word_embeddings:
        return config
    if wte is None or not torch.equal(head, wte):
        return dataclasses.replace(config, tie_word_embeddings=False)
    del tensors[HEAD]
    return config


def level(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in one dtype that rounds none of them: layers cannot compute in several.

    >>> half = torch.ones(1, dtype=torch.float16)
    >>> level({"a": half, "b": half.bfloat16()})["a"].dtype
    torch.float32
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def read_tensors(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files under our names; mask buffers left out."""
    tensors = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    if not name.endswith(BUFFERS):
                        tensor = file.get_tensor(name)
                        if tensor.is_floating_point():  # codes as floats would pass for weights
                            tensor = tensor.to(dtype=dtype)
                        tensors[name.removeprefix(PREFIX)] = tensor
        except SafetensorError as error:
            raise WeightsError(f"{path} {_diagnose(path, error)}") from error
    return tensors


def check_tensors(model: GPT, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise WeightsError, naming up to three tensors, unless they are exactly the model's."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name} is {found[name]}, config.json says {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    for what, names in (
        ("tensors missing", [name for name in expected if name not in found]),
        ("tensors unknown to GPT-2", [name for name in found if name not in expected]),
        ("tensors of another shape", wrong),
        ("tensors that are no floats", [n for n in found if not tensors[n].is_floating_point()]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise WeightsError(f"{folder} has {what}: {', '.join(names[:3])}{more}")


def save(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors in Hugging Face's layout, a tied head once.

    Each file is written beside its place and renamed, so a full disk leaves the old ones whole.
    Raises ValueError for a model with wrapped layers: the file would load nowhere.
    """
    with torch.device("meta"):
        plain = GPT(model.config).state_dict()
    foreign = [name for name in model.state_dict() if name not in plain]
    if foreign:
        raise ValueError(
            f"only a plain GPT can be saved, this one holds {foreign[0]}: merge or take off what "
            "wraps its layers, or save that by its own step: quant.save, lora.save, adapters.save"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name if name == HEAD else PREFIX + name: tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    save_tensors(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {**config_step.to_dict(model.config), "dtype": dtype})


def _diagnose(path: Path, error: SafetensorError) -> str:
    """Say what the file is, if it is not safetensors."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: run `git lfs pull` there"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not the weights: download it again"
    return f"is not a whole safetensors file ({error}): download it again"
