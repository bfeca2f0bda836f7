"""Beside step 10: how a file holds quantized layers, in bitsandbytes' and transformers' words.

    h.0.attn.c_attn.weight                                    4 bits: the packed codes
    h.0.attn.c_attn.weight.absmax, .quant_map                 and of what they are parts
                   .weight.nested_absmax, .nested_quant_map   the same of absmax itself
                   .weight.quant_state.bitsandbytes__nf4      JSON in bytes: the rest
    h.0.attn.c_attn.weight, .SCB, .weight_format              8 bits: codes, rows' scales, order

Used by: quant.py.  Proof: tests/test_quant.py.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minigpt import blockwise
from minigpt.files import WeightsError
from minigpt.quant_linear import Linear4bit, Linear8bit, Quantized

STATE = "weight.quant_state.bitsandbytes__"  # and the kind


def to_tensors(layer: Quantized) -> dict[str, Tensor]:
    """What a file holds of a layer's weight. Raises ValueError where bitsandbytes would misread it.

    bitsandbytes 0.50 on a CPU unpacks a row that ends within a block wrongly, unless its length is
    odd.
    """
    if isinstance(layer, Linear8bit):
        by_rows = torch.zeros((), dtype=torch.uint8)
        return {"weight": layer.weight, "SCB": layer.scale, "weight_format": by_rows}
    assert isinstance(layer, Linear4bit)
    K = layer.in_features
    if K % layer.block_size and K % 2 == 0:
        raise ValueError(
            f"{K} inputs are no multiple of the block size {layer.block_size}: bitsandbytes would "
            "unpack the file wrongly; use int8, or a block size that divides them"
        )
    state: dict[str, Any] = {
        "quant_type": layer.kind,
        "blocksize": layer.block_size,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    found = {
        "weight": layer.weight,
        "weight.absmax": layer.absmax,
        "weight.quant_map": blockwise.TABLES[layer.kind].clone(),
    }
    if layer.nested_absmax is not None and layer.nested_offset is not None:
        found["weight.nested_absmax"] = layer.nested_absmax
        found["weight.nested_quant_map"] = blockwise.dynamic_map().clone()
        state["nested_blocksize"] = blockwise.NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = layer.nested_offset.item()
    found[STATE + layer.kind] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found


def shape_of(found: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(out, in) of the weight that these tensors hold; None if they are no quantized ones."""
    if "SCB" in found:
        out_features, in_features = found["weight"].shape
    elif state := _state(found):
        out_features, in_features = state["shape"]
    else:
        return None
    return out_features, in_features


def to_layer(
    path: str, found: Mapping[str, Tensor], bias: Tensor, settings: Mapping[str, Any]
) -> Quantized:
    """Build a layer from its tensors and config.json's quantization_config.

    Raises ValueError, naming the tensor, if they do not fit together.
    """

    def check(name: str, dtype: torch.dtype, count: int) -> None:
        tensor = found.get(name, torch.empty(0))
        if tensor.dtype != dtype or tensor.numel() != count:
            got = f"{tensor.numel()} in {tensor.dtype}"
            raise ValueError(f"{path}.{name} must be {count} numbers in {dtype}, got {got}")

    if "SCB" in found:
        check("weight", torch.int8, found["weight"].numel())
        check("SCB", torch.float32, len(found["weight"]))
        if order := found.get("weight_format", torch.zeros(())).item():
            raise ValueError(f"{path}.weight_format must be 0, row by row, got {order}")
        threshold = float(settings.get("llm_int8_threshold", 6.0))
        return Linear8bit(found["weight"], found["SCB"], bias, threshold=threshold)
    state = _state(found)
    if state["quant_type"] not in blockwise.TABLES:
        raise ValueError(f"{path}: quant_type must be nf4 or fp4, got {state['quant_type']!r}")
    out_features, in_features = state["shape"]
    blocks = math.ceil(out_features * in_features / state["blocksize"])
    nested = None
    if "nested_offset" in state:
        if (size := state["nested_blocksize"]) != blockwise.NESTED_BLOCK:
            raise ValueError(f"{path}: nested_blocksize must be 256, got {size!r}")
        check("weight.nested_absmax", torch.float32, math.ceil(blocks / size))
        offset = torch.tensor(state["nested_offset"], device=bias.device)
        nested = (found["weight.nested_absmax"], offset)
    check("weight", torch.uint8, math.ceil(out_features * in_features / 2))
    check("weight.absmax", torch.uint8 if nested else torch.float32, blocks)
    return Linear4bit(
        (out_features, in_features),
        found["weight"],
        found["weight.absmax"],
        bias,
        kind=state["quant_type"],
        block_size=state["blocksize"],
        dtype=getattr(torch, state["dtype"]),
        nested=nested,
        compute_dtype=getattr(torch, settings.get("bnb_4bit_compute_dtype", "float32")),
    )


def to_settings(layer: Quantized) -> dict[str, Any]:
    """config.json's quantization_config, as transformers' BitsAndBytesConfig writes it."""
    four = isinstance(layer, Linear4bit)
    found = {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
    if isinstance(layer, Linear4bit):
        found["bnb_4bit_compute_dtype"] = str(layer.compute_dtype).removeprefix("torch.")
        found["bnb_4bit_quant_type"] = layer.kind
        found["bnb_4bit_use_double_quant"] = layer.nested_absmax is not None
    elif isinstance(layer, Linear8bit):
        found["llm_int8_threshold"] = layer.threshold
    return found


def check_settings(settings: Any) -> None:
    """Raise WeightsError for another way of quantizing."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method != "bitsandbytes":
        raise WeightsError(f"quant_method must be bitsandbytes, got {method!r}")
    storage = settings.get("bnb_4bit_quant_storage", "uint8")
    if settings.get("load_in_4bit") and storage != "uint8":
        raise WeightsError(f"bnb_4bit_quant_storage must be uint8, got {storage!r}")


def _state(found: Mapping[str, Tensor]) -> dict[str, Any]:
    for name, tensor in found.items():
        if name.startswith(STATE):
            return json.loads(bytes(tensor.tolist()))
    return {}
