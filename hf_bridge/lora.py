"""Step 11 through peft.

After `adapt` the wrapper's `hf` is a PeftModel: peft has wrapped the layers inside it. What the
bridge adds, because the library does without: a target that names nothing is an error, as is a
file that would load as a no-op (peft warns at most); new adapters come in eval mode where the
model is, else their dropout acts; the choice of q, k and v, here by a hook on B's gradient; and a
way back from `merge_and_unload`, which adds to the base in place: it gets a copy.

Before: quant.py.  After: adapters.py.  Twin: minigpt/lora.py.  Proof: tests/test_lora.py.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_bridge import peft_files
from hf_bridge.files import WeightsError
from hf_bridge.model import GPT

THIRDS = "qkv"


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

    The same generator gives the same A as in minigpt. Raises ValueError for what makes no adapter.
    """
    if isinstance(targets, str):
        raise ValueError(f"targets must be several names, got the one string {targets!r}")
    _check_numbers(rank, alpha, dropout)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=dropout,
        use_rslora=rslora,
        fan_in_fan_out=True,  # GPT-2's Conv1D stores (in, out); else peft warns and corrects it
        task_type="CAUSAL_LM",
    )
    config.qkv = qkv  # no field of peft's: adapter_config.json will not hold it
    _attach(model, config, name, generator)


def activate(model: GPT, name: str | None) -> None:
    """Compute with this adapter from now on; None: with none, as the base does."""
    peft = _adapted(model, name)
    trained = [p for p in peft.parameters() if p.requires_grad]
    if name is None:
        peft.base_model.disable_adapter_layers()
    else:
        peft.base_model.enable_adapter_layers()
        peft.set_adapter(name)
    peft.requires_grad_(False)  # the library changes what trains, too
    for parameter in trained:
        parameter.requires_grad_(True)


def merge(model: GPT) -> PeftModel:
    """Add the active adapter to the weights: a plain GPT2LMHeadModel again, still frozen.

    Returns what it took out, for `unmerge`. With no adapter active the plain model is the base.
    """
    peft = _adapted(model)
    if _active(peft) and not all(isinstance(m.get_base_layer(), Conv1D) for m in _layers(peft)):
        raise ValueError(
            "merging needs a float base, got a quantized one, which would round the sum: load the "
            "float model, lora.load the adapter onto it, and merge there"
        )
    copied = copy.deepcopy(peft)
    model.hf = copied.merge_and_unload() if _active(peft) else copied.unload()
    return peft


def unmerge(model: GPT, removed: PeftModel) -> None:
    """Put back what `merge` removed; the base's weights are bit for bit what they were."""
    if isinstance(model.hf, PeftModel):
        raise ValueError("the model holds LoRA layers: only a merged one can be unmerged, once")
    model.hf = removed


def save(
    model: GPT, folder: str | Path, *, name: str | None = None, base_model: str | None = None
) -> None:
    """Write an adapter, by default the active one.

    PeftModel.save_pretrained would put any but the one named "default" in a directory of its own.
    """
    peft = _adapted(model, name)
    name = name or _active(peft)
    if name is None:
        raise ValueError(f"no adapter is named None: the model holds {', '.join(peft.peft_config)}")
    tensors = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
    peft_files.write(Path(folder), peft.peft_config[name], tensors, base_model)


def load(
    model: GPT,
    folder: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    base_model: str | None = None,
) -> None:
    """Read an adapter and activate it; only it trains, if `trainable`.

    Raises WeightsError, the model being as before, unless the files hold the A and B of just the
    layers that they target: peft would warn of what is missing, and skip what it does not expect.
    """
    folder = Path(folder)
    config, tensors = peft_files.read(folder, base_model)
    try:
        _check_numbers(config.r, config.lora_alpha, config.lora_dropout)
        shapes = {}
        for path, (in_features, out_features) in _targeted(model, config.target_modules).items():
            shapes[f"base_model.model.{path}.lora_A.weight"] = (config.r, in_features)
            shapes[f"base_model.model.{path}.lora_B.weight"] = (out_features, config.r)
        peft_files.check(tensors, shapes)
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from error
    _attach(model, config, name, torch.Generator())
    set_peft_model_state_dict(model.hf, tensors, adapter_name=name)
    if not trainable:
        model.hf.requires_grad_(False)


def _check_numbers(rank: object, alpha: object, dropout: object) -> None:
    """Raise ValueError for numbers that make no adapter; peft divides by them as they come."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a number above 0, got {alpha!r}")
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")


def _attach(model: GPT, config: LoraConfig, name: str, generator: torch.Generator | None) -> None:
    """Check, then let peft wrap the layers; the new adapter is active, and alone it trains."""
    targeted = _targeted(model, config.target_modules)
    taken = isinstance(model.hf, PeftModel) and name in model.hf.peft_config
    if taken or "." in name or name in "lora_" or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name must be a new word without dots, got {name!r}")
    qkv = config.qkv
    if not qkv or not set(qkv) <= set(THIRDS):
        raise ValueError(f"qkv must be some of the letters q, k and v, got {qkv!r}")
    if qkv != THIRDS and not any(path.endswith("c_attn") for path in targeted):
        raise ValueError(f"qkv chooses within c_attn, which is no target, got qkv={qkv!r}")
    config.inference_mode, config.base_model_name_or_path = False, None
    with _lent(generator), warnings.catch_warnings():
        # peft asks transformers for what will be called otherwise
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        if isinstance(model.hf, PeftModel):
            model.hf.add_adapter(name, config)
        else:
            model.hf = get_peft_model(model.hf, config, adapter_name=name)
    model.hf.train(model.training)
    model.hf.requires_grad_(False)
    for path in targeted:
        layer = model.hf.base_model.model.get_submodule(path)
        layer.lora_A[name].requires_grad_(True)
        weight = layer.lora_B[name].requires_grad_(True).weight  # (out, R)
        if path.endswith("c_attn") and qkv != THIRDS:
            chosen = torch.tensor([third in qkv for third in THIRDS], device=weight.device)
            rows = chosen.repeat_interleave(len(weight) // 3)[:, None]
            weight.register_hook(lambda gradient, rows=rows: gradient * rows)
    activate(model, name)


@contextmanager
def _lent(generator: torch.Generator | None) -> Iterator[None]:
    """peft draws from the global generator: lend it this one's state for a while."""
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            torch.set_rng_state(generator.get_state())
        yield
        if generator is not None:
            generator.set_state(torch.get_rng_state())


def _targeted(model: GPT, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of the blocks' linear layers whose names end in a target."""
    plain = model.hf.get_base_model() if isinstance(model.hf, PeftModel) else model.hf
    linear = {}
    for path, layer in plain.transformer.h.named_modules(prefix="transformer.h"):
        if isinstance(layer, Conv1D):
            linear[path] = (layer.nx, layer.nf)
        elif hasattr(layer, "in_features"):
            linear[path] = (layer.in_features, layer.out_features)
    found = {t: [p for p in linear if f".{p}".endswith(f".{t}")] for t in targets}
    missed = sorted(target for target, paths in found.items() if not paths)
    if missed or not found:
        raise ValueError(
            "targets must be names of linear layers: c_attn, c_proj, c_fc, or attn.c_proj and so "
            f"on, got {', '.join(map(repr, missed)) or 'none'}"
        )
    chosen = set().union(*found.values())
    return {path: size for path, size in linear.items() if path in chosen}


def _adapted(model: GPT, name: str | None = None) -> PeftModel:
    """The PeftModel that `adapt` or `load` made; `name` must be one of its adapters."""
    if not isinstance(model.hf, PeftModel):
        raise ValueError("the model holds no LoRA layers: adapt it or load an adapter first")
    if name is not None and name not in model.hf.peft_config:
        known = ", ".join(sorted(model.hf.peft_config))
        raise ValueError(f"no adapter is named {name!r}: the model holds {known}")
    return model.hf


def _layers(peft: PeftModel) -> list[LoraLayer]:
    return [module for module in peft.modules() if isinstance(module, LoraLayer)]


def _active(peft: PeftModel) -> str | None:
    return None if _layers(peft)[0].disable_adapters else peft.active_adapter
