"""Step 11: train low-rank corrections of a frozen model, and merge them into it.

    h = W0 x + (alpha / R) B A x                      Hu et al. 2021, equation (3) and its scaling

low_rank.py computes this; here a model's layers are wrapped in it, and unwrapped. Several adapters
may be loaded, under names, and one of them, or none, is active.

Before: quant.py.  After: adapters.py.  Twin: hf_bridge/lora.py.  Proof: tests/test_lora.py.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from minigpt import peft_files
from minigpt.attention import Conv1D
from minigpt.files import WeightsError
from minigpt.low_rank import THIRDS, LoRAConfig, LoRALinear, LowRank, rows_of, sizes
from minigpt.model import GPT


def adapt(
    model: GPT,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Iterable[str] = ("c_attn",),
    dropout: float = 0.0,
    rslora: bool = False,
    qkv: str = THIRDS,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> None:
    """Freeze the model and correct its linear layers: only the new A and B train.

    `targets` are ends of layers' names, as in peft: "c_proj" is found in attention and in the MLP,
    "attn.c_proj" in attention only. `qkv` "qv" corrects the queries and values of c_attn, and not
    the keys. Raises ValueError for what makes no adapter; the model is then as before.
    """
    if isinstance(targets, str):
        raise ValueError(f"targets must be several names, got the one string {targets!r}")
    _attach(model, LoRAConfig(rank, alpha, tuple(targets), dropout, rslora, qkv), name, generator)


def activate(model: GPT, name: str | None) -> None:
    """Compute with this adapter from now on; None: with none, as the base does."""
    layers = _adapted(model)
    if name is not None:
        _named(layers, name)
    for layer in layers.values():
        layer.active = name


def merge(model: GPT) -> dict[str, LoRALinear]:
    """Add the active adapter to the weights: a plain model again, still frozen.

    Returns what it took out, for `unmerge`. With no adapter active the plain model is the base.
    """
    layers = _adapted(model)
    plain = {path: layer.merged() for path, layer in layers.items()}
    for path, layer in plain.items():
        model.set_submodule(path, layer)
    return layers


def unmerge(model: GPT, removed: dict[str, LoRALinear]) -> None:
    """Put back what `merge` removed; the base's weights are bit for bit what they were."""
    if _layers(model):
        raise ValueError("the model holds LoRA layers: only a merged one can be unmerged, once")
    for path, layer in removed.items():
        model.set_submodule(path, layer)


def save(
    model: GPT, folder: str | Path, *, name: str | None = None, base_model: str | None = None
) -> None:
    """Write an adapter, by default the active one, as peft does.

    `base_model` is the name of the model that it corrects, for whoever loads it.
    """
    layers = _adapted(model)
    active = next((layer.active for layer in layers.values() if layer.active), None)
    adapters = _named(layers, name or active)
    tensors = {}
    for path, adapter in adapters.items():
        tensors[f"{path}.lora_A"] = adapter.lora_A.detach()
        tensors[f"{path}.lora_B"] = adapter.full_B().detach()
    config = next(iter(adapters.values())).config
    peft_files.write(Path(folder), asdict(config), tensors, base_model)


def load(
    model: GPT,
    folder: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    base_model: str | None = None,
) -> None:
    """Read an adapter that `save` or peft wrote, and activate it; only it trains, if `trainable`.

    Its base's name is compared with `base_model` where both are told. Raises WeightsError, the
    model being as before, unless the files hold the A and B of just the layers that they target.
    """
    folder = Path(folder)
    settings, tensors = peft_files.read(folder, base_model)
    try:
        config = LoRAConfig(**settings)
        shapes: dict[str, tuple[int, ...]] = {}
        for path, layer in _targeted(model, config.targets).items():
            in_features, out_features = sizes(layer)
            shapes[f"{path}.lora_A"] = (config.rank, in_features)
            shapes[f"{path}.lora_B"] = (out_features, config.rank)
        peft_files.check(tensors, shapes)
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from error
    generator = torch.Generator()  # what is drawn is replaced: leave the global one alone
    for path, adapter in _attach(model, config, name, generator).items():
        adapter.fill(tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"])
        adapter.requires_grad_(trainable)


def _attach(
    model: GPT, config: LoRAConfig, name: str, generator: torch.Generator | None
) -> dict[str, LowRank]:
    """Check everything, then freeze the model and add the corrections that config describes."""
    targeted = _targeted(model, config.targets)
    taken = any(layer.get(name) for layer in _layers(model).values())
    if taken or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name must be a new word without dots, got {name!r}")
    if config.qkv != THIRDS and not any(path.endswith("c_attn") for path in targeted):
        raise ValueError(f"qkv chooses within c_attn, which is no target, got qkv={config.qkv!r}")
    model.requires_grad_(False)
    added = {}
    for path, layer in targeted.items():
        wrapper = layer if isinstance(layer, LoRALinear) else LoRALinear(layer)
        rows = rows_of(wrapper.out_features, config.qkv) if path.endswith("c_attn") else None
        added[path] = wrapper.add(name, config, rows=rows, generator=generator)
        model.set_submodule(path, wrapper)
    activate(model, name)
    return added


def _targeted(model: GPT, targets: Iterable[str]) -> dict[str, nn.Module]:
    """The blocks' linear layers whose names end in a target, in the model's order."""
    linear = {
        path: layer
        for path, layer in model.h.named_modules(prefix="h")
        if isinstance(layer, Conv1D) or hasattr(layer, "in_features")
    }
    found = {t: [p for p in linear if f".transformer.{p}".endswith(f".{t}")] for t in targets}
    missed = sorted(target for target, paths in found.items() if not paths)
    if missed or not found:
        raise ValueError(
            "targets must be names of linear layers: c_attn, c_proj, c_fc, or attn.c_proj and so "
            f"on, got {', '.join(map(repr, missed)) or 'none'}"
        )
    chosen = set().union(*found.values())
    return {path: layer for path, layer in linear.items() if path in chosen}


def _layers(model: GPT) -> dict[str, LoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def _adapted(model: GPT) -> dict[str, LoRALinear]:
    """The layers that `adapt` and `load` made, of which there must be some."""
    layers = _layers(model)
    if not layers:
        raise ValueError("the model holds no LoRA layers: adapt it or load an adapter first")
    return layers


def _named(layers: dict[str, LoRALinear], name: str | None) -> dict[str, LowRank]:
    """The corrections of one adapter, which must be there."""
    found = {path: a for path, layer in layers.items() if (a := layer.get(name)) is not None}
    if not found:
        known = sorted({known for layer in layers.values() for known in layer.adapters})
        raise ValueError(f"no adapter is named {name!r}: the model holds {', '.join(known)}")
    return found
