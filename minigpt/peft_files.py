"""Beside step 11: the two files in which peft keeps an adapter.

    adapter_config.json           r, lora_alpha, target_modules …
    adapter_model.safetensors     base_model.model.transformer.h.0.attn.c_attn.lora_A.weight …

peft skips a tensor whose name it does not expect, and then answers as the base model does. Here
that is an error.

Twin: hf_bridge/peft_files.py.  Proof: tests/test_lora.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt.files import WeightsError, read_json, save_tensors, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SUFFIX = "base_model.model.transformer.", ".weight"
NAMES = {  # peft's names of our settings
    "rank": "r",
    "alpha": "lora_alpha",
    "targets": "target_modules",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
}
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
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], base_model: str | None
) -> None:
    """Write both files, each whole or not at all. Raises ValueError for weights that are NaN."""
    check(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    folder.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name + SUFFIX: tensor for name, tensor in tensors.items()}
    # The choice of q, k and v stands here, since peft warns about fields that it does not know.
    choice = {} if settings["qkv"] == "qkv" else {"qkv": settings["qkv"]}
    save_tensors(named, folder / WEIGHTS, metadata=choice)
    published = {theirs: settings[ours] for ours, theirs in NAMES.items()}
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    more = {
        "fan_in_fan_out": True,
        "inference_mode": True,
        "base_model_name_or_path": name_elsewhere(base_model),
    }
    write_json(folder / CONFIG, {**fixed, **published, **more})


def read(folder: Path, base_model: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's settings by our names, and its tensors by the names of our layers.

    Raises WeightsError for files that are missing, pickled or damaged, for another kind of
    adapter, and for one made for another base than `base_model`, where both are told.
    """
    settings = _read_config(folder, base_model)
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise WeightsError(
                f"{folder} holds only adapter_model.bin, a pickle, which can run code: "
                f"save the adapter as {WEIGHTS}"
            )
        raise WeightsError(f"{path} is missing: the adapter has no weights")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            settings["qkv"] = (file.metadata() or {}).get("qkv", "qkv")
            for name in file.keys():  # noqa: SIM118 (no dict)
                if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
                    raise WeightsError(
                        f"{path}: tensors must be named {PREFIX}…{SUFFIX}, got {name}: "
                        "peft would load nothing and answer as the base model"
                    )
                tensors[name.removeprefix(PREFIX).removesuffix(SUFFIX)] = file.get_tensor(name)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error
    return settings, tensors


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming a tensor, unless these are finite and of just these shapes."""
    for name in sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"{name} is missing: its layer would compute as the base does")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{name} is expected by no targeted layer of this base")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name} must be {shapes[name]} on this base, got {tuple(tensor.shape)}"
            )
        if not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must hold finite numbers, got NaN or infinity")


def check_base(path: Path, made_for: str | None, base_model: str | None) -> None:
    """Raise WeightsError for an adapter of another base, where both are told."""
    if made_for and base_model and _last(made_for) != _last(base_model):
        raise WeightsError(
            f"{path}: made for the base {made_for!r}, not {base_model!r}: give that one, or, where "
            "this is the same, change base_model_name_or_path in the file"
        )


def _read_config(folder: Path, base_model: str | None) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(f"{path} is missing: an adapter's directory holds it and {WEIGHTS}")
    published = read_json(path)
    if not isinstance(published, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(published).__name__}")
    if published.get("peft_type") != "LORA":
        raise WeightsError(f"{path}: peft_type must be LORA, got {published.get('peft_type')!r}")
    check_base(path, published.get("base_model_name_or_path"), base_model)
    if published.get("init_lora_weights", True) not in (True, False, "gaussian"):
        start = published["init_lora_weights"]
        raise WeightsError(f"{path}: init_lora_weights {start!r} may change the base's own weights")
    for field in published.keys() - HARMLESS - set(NAMES.values()):
        if published[field] not in (None, False, {}, [], "none"):
            raise WeightsError(f"{path}: {field} must be off here, got {published[field]!r}")
    missing = [field for field in ("r", "target_modules") if field not in published]
    if missing:
        raise WeightsError(f"{path} must tell {' and '.join(missing)}")
    if not isinstance(published["target_modules"], list):
        raise WeightsError(
            f"{path}: target_modules must be a list of names, got {published['target_modules']!r}"
        )
    defaults = {"lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
    known = {**defaults, **published}
    return {
        ours: known[theirs] if ours != "targets" else tuple(sorted(known[theirs]))
        for ours, theirs in NAMES.items()
    }


def name_elsewhere(base_model: str | None) -> str | None:
    """A base's name for the adapter's file: "." would be another directory for whoever reads it."""
    if base_model is not None and Path(base_model).name in ("", ".."):
        return str(Path(base_model).resolve())
    return base_model


def _last(name: object) -> str:
    """What a directory or a hub id is called: people move the one and mirror the other."""
    path = Path(os.path.expanduser(str(name)))
    return (path.resolve() if path.is_dir() else path).name
