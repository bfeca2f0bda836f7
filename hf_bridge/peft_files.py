"""Beside step 11: an adapter's two files, through peft's own configuration.

peft looks for what is missing on the hub, takes a pickled adapter_model.bin as readily, skips a
tensor whose name it does not expect, and starts afresh what a file tells of and does not hold. Here
each of these is an error, and so is what minigpt does not compute.

Twin: minigpt/peft_files.py.  Proof: tests/test_lora.py.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_bridge.files import WeightsError, read_json, writing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
USED = {"r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora"}
# Fields that say nothing about what a trained adapter computes. Any other must be off.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}


def write(
    folder: Path, settings: LoraConfig, tensors: Mapping[str, Tensor], base_model: str | None
) -> None:
    """Write both files. Raises ValueError for weights that are NaN."""
    check(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    metadata = {"format": "pt"}
    if settings.qkv != "qkv":  # here, since peft warns about fields that it does not know
        metadata["qkv"] = settings.qkv
    settings = copy.copy(settings)
    settings.inference_mode = True
    settings.base_model_name_or_path = name_elsewhere(base_model)
    with writing(folder) as part:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, part / WEIGHTS, metadata=metadata)
        settings.save_pretrained(part)


def read(folder: Path, base_model: str | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration and its tensors by peft's names; WeightsError as in minigpt."""
    _check_config(folder / CONFIG, base_model)
    settings = PeftConfig.from_pretrained(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise WeightsError(
                f"{folder} holds only adapter_model.bin, a pickle, which can run code: "
                f"save the adapter as {WEIGHTS}"
            )
        raise WeightsError(f"{path} is missing: the adapter has no weights")
    try:
        with safe_open(path, framework="pt") as file:
            settings.qkv = (file.metadata() or {}).get("qkv", "qkv")
        return settings, load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming a tensor, unless these are finite and of just these shapes."""
    for name in sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"{name} is missing: its layer would compute as the base does")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{name} is expected by no targeted layer of this base")
        if tuple(tensor.shape) != shapes[name]:
            got = tuple(tensor.shape)
            raise ValueError(f"{name} must be {shapes[name]} on this base, got {got}")
        if not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must hold finite numbers, got NaN or infinity")


def check_base(path: Path, made_for: str | None, base_model: str | None) -> None:
    """Raise WeightsError for an adapter of another base, where both are told."""
    if made_for and base_model and _last(made_for) != _last(base_model):
        raise WeightsError(
            f"{path}: made for the base {made_for!r}, not {base_model!r}: give that one, or, where "
            "this is the same, change base_model_name_or_path in the file"
        )


def _check_config(path: Path, base_model: str | None) -> None:
    """Raise WeightsError for an adapter of another kind or base, or that does more than LoRA."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing: an adapter's directory holds it and {WEIGHTS}")
    published = read_json(path)
    if not isinstance(published, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(published).__name__}")
    if published.get("peft_type") != "LORA":
        raise WeightsError(f"{path}: peft_type must be LORA, got {published.get('peft_type')!r}")
    check_base(path, published.get("base_model_name_or_path"), base_model)
    start = published.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        raise WeightsError(f"{path}: init_lora_weights {start!r} may change the base's own weights")
    for field in published.keys() - HARMLESS - USED:
        if published[field] not in (None, False, {}, [], "none"):
            raise WeightsError(f"{path}: {field} must be off here, got {published[field]!r}")
    missing = [field for field in ("r", "target_modules") if field not in published]
    if missing:
        raise WeightsError(f"{path} must tell {' and '.join(missing)}")
    if not isinstance(published["target_modules"], list):
        targets = published["target_modules"]
        raise WeightsError(f"{path}: target_modules must be a list of names, got {targets!r}")


def name_elsewhere(base_model: str | None) -> str | None:
    """A base's name for the adapter's file: "." would be another directory for whoever reads it."""
    if base_model is not None and Path(base_model).name in ("", ".."):
        return str(Path(base_model).resolve())
    return base_model


def _last(name: object) -> str:
    """What a directory or a hub id is called: people move the one and mirror the other."""
    path = Path(os.path.expanduser(str(name)))
    return (path.resolve() if path.is_dir() else path).name
