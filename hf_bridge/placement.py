"""Beside step 7: where a model's parts lie, and which kernel attends. Only transformers has this.

device_map spreads a model over devices: what lies on the "cpu" beside a GPU, or on the "disk", is
brought in for its turn only, by accelerate's hooks; on disk it stays in model.safetensors itself.
What the bridge adds, because the libraries do without: a part's name that is none is an error (it
would be ignored), and so is a kernel that cannot be had here, with what to take instead.

Proof: tests/test_placement.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import is_flash_attn_2_available

from hf_bridge import config as config_step
from hf_bridge import weights
from hf_bridge.files import read_json, resolve
from hf_bridge.mask import check_window
from hf_bridge.model import GPT

KERNELS = ("sdpa", "eager", "flash_attention_2")
HELD = ("transformer.wte", "transformer.wpe", "lm_head")  # ids and caches go where these are


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, str] = "cpu",
    attn_implementation: str = "sdpa",
    sliding_window: int | None = None,
    attention_sinks: int = 0,
) -> GPT:
    """GPT.from_pretrained, placed: on a device, by "auto", or by parts.

    A map of parts has keys such as "transformer.h.3", and "" for all the others; what it says is a
    device or "disk". Raises ValueError, before anything is read, for what cannot be had here.
    """
    check_window(sliding_window, attention_sinks)
    _check_kernel(attn_implementation, sliding_window, dtype)
    folder = resolve(name_or_path)
    parts = _parts(config_step.read(folder).n_layer)
    quantized = "quantization_config" in read_json(folder / "config.json")
    if device_map == "auto" and (quantized or not torch.cuda.is_available()):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, str) and device_map != "auto":
        device_map = {"": device_map}
    if isinstance(device_map, Mapping):
        device_map = _expand(device_map, parts)
        places = set(device_map.values())
        if len(places) == 1:
            model = GPT.from_pretrained(folder, dtype=dtype, device=places.pop())
            model._slide(sliding_window, attention_sinks, attn_implementation)
            return model
        if quantized:
            raise ValueError(
                "a quantized model lies on one device: device_map must be cpu, cuda or auto, "
                f"got {' and '.join(sorted(places))}"
            )
    model = weights.read(folder, dtype=dtype, device_map=device_map)
    if model.device.type == "meta":
        raise ValueError("device_map auto finds no room for the embedding: free some memory")
    model._slide(sliding_window, attention_sinks, attn_implementation)
    return model


def _parts(layers: int) -> tuple[str, ...]:
    """The parts that can be placed apart."""
    blocks = [f"transformer.h.{i}" for i in range(layers)]
    return ("transformer.wte", "transformer.wpe", *blocks, "transformer.ln_f", "lm_head")


def _expand(device_map: Mapping[str, str], parts: tuple[str, ...]) -> dict[str, str]:
    """Each part's place; ValueError for parts and places that are none."""
    unknown = sorted(device_map.keys() - {"", *parts})
    if unknown:
        raise ValueError(
            f"device_map must name parts from {parts[0]}, {parts[2]} … to {parts[-1]}, or '' for "
            f"the rest, got {', '.join(map(repr, unknown))}"
        )
    placed = {part: device_map.get(part, device_map.get("")) for part in parts}
    left = [part for part, place in placed.items() if place is None]
    if left:
        raise ValueError(f"device_map leaves out {', '.join(left)}: name them, or '' for the rest")
    for part, place in placed.items():
        if place == "disk":
            if part in HELD:
                raise ValueError(f"{part} must stay in memory: only blocks and ln_f can be on disk")
            continue
        _check_device(place)
    return {part: str(place) for part, place in placed.items()}


def _check_device(place: object) -> None:
    """Raise ValueError unless this machine has the device."""
    try:
        device = torch.device(str(place))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device_map must say auto, cpu, cuda, cuda:N or disk, got {place!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        has = f"the last GPU is cuda:{count - 1}" if count else "there is no GPU"
        raise ValueError(f"device_map {place} cannot be had, {has}: use cpu or auto")


def _check_kernel(name: str, window: int | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless the kernel can be had, for such a model, on this machine."""
    if name not in KERNELS:
        raise ValueError(f"attn_implementation must be one of {', '.join(KERNELS)}, got {name!r}")
    if name != "sdpa" and window is not None:
        raise ValueError(f"a sliding window is for attn_implementation sdpa, got {name}")
    if name == "flash_attention_2":
        lacking = [] if torch.cuda.is_available() else ["a CUDA GPU"]
        lacking += [] if is_flash_attn_2_available() else ["the package flash-attn"]
        if lacking:
            raise ValueError(
                f"attn_implementation flash_attention_2 needs {' and '.join(lacking)}: "
                "use sdpa or eager"
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"flash_attention_2 computes in float16 or bfloat16, got {dtype}")
