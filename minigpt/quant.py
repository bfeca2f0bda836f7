"""Step 10: a model whose matrices are codes of 8 or 4 bits, the same codes as bitsandbytes'.

    y = x W^T + b    becomes    y = x dequantize(codes)^T + b

The blocks' four matrices are most of a model. Embeddings, norms, biases and the head stay floats:
they are few, or every logit feels them. The layers are in quant_linear.py, their arithmetic in
blockwise.py (Dettmers et al. 2023) and int8.py (Dettmers et al. 2022), their files in bnb_files.py.

Before: generate.py.  After: lora.py.  Twin: hf_bridge/quant.py.  Proof: tests/test_quant.py.
"""

import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from minigpt import bnb_files, weights
from minigpt import config as config_step
from minigpt.attention import Conv1D
from minigpt.files import WeightsError, read_json, resolve, save_tensors, write_json
from minigpt.model import GPT
from minigpt.quant_linear import Linear4bit, Linear8bit, Quantized

KINDS = ("nf4", "fp4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    model: GPT,
    kind: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = False,
    threshold: float = 6.0,
    progress: bool = True,
) -> GPT:
    """Replace the blocks' linear layers, in place, by "nf4", "fp4" or "int8" ones; all is frozen.

    `block_size` and `double_quant` are for 4 bits. `threshold` is for int8: the size from which an
    activation is an outlier, 0 for none. A terminal shows a bar, unless `progress` is False.
    Raises ValueError, the model being as before, for settings that are none, for weights that are
    no numbers, and for a model with wrapped layers.
    """
    from tqdm import tqdm

    _check_settings(kind, block_size, double_quant, threshold)
    _check_model(model)
    layers, hidden = _linear(model), None if progress else True
    for path, layer in tqdm(layers.items(), unit="matrix", desc="quantize", disable=hidden):
        weight, bias = layer.weight.T.contiguous(), layer.bias  # (out, in)
        quantized: Quantized
        if kind == "int8":
            quantized = Linear8bit.from_float(weight, bias, threshold=threshold)
        else:
            quantized = Linear4bit.from_float(
                weight, bias, kind=kind, block_size=block_size, double_quant=double_quant
            )
        model.set_submodule(path, quantized.train(model.training))
    return model.requires_grad_(False)


def dequantize(model: GPT) -> GPT:
    """Replace quantized layers, in place, by float ones that hold what the codes stand for."""
    for path, layer in _quantized(model).items():
        plain = Conv1D(layer.in_features, layer.out_features)
        weight = layer.dequantize().T.contiguous().to(layer.bias.dtype)
        plain.weight, plain.bias = nn.Parameter(weight), layer.bias
        model.set_submodule(path, plain.requires_grad_(False).train(model.training))
    return model


def save(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors as transformers does with bitsandbytes.

    Raises ValueError for a model that is not quantized, or holds other wrapped layers.
    """
    layers = _quantized(model)
    if not layers:
        raise ValueError("the model is not quantized: quantize it first, or use save_pretrained")
    tensors = _floats(model)
    for path, layer in layers.items():
        tensors |= {f"{path}.{name}": t for name, t in bnb_files.to_tensors(layer).items()}
    named = {n if n == weights.HEAD else weights.PREFIX + n: t for n, t in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(
        {name: tensor.detach() for name, tensor in named.items()}, folder / "model.safetensors"
    )
    settings = bnb_files.to_settings(next(iter(layers.values())))
    if left := [weights.PREFIX + path for path in _linear(model)]:  # a loaded model may have some
        settings["llm_int8_skip_modules"] = ["lm_head", *left]
    config = {
        **config_step.to_dict(model.config),
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
        "quantization_config": settings,
    }
    write_json(folder / "config.json", config)


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """Read what `save` or transformers wrote; GPT.from_pretrained comes here by itself.

    `dtype` is for what stayed floats. Raises WeightsError for files that are damaged, of another
    model, or quantized in another way.
    """
    folder = resolve(name_or_path)
    config = config_step.read(folder)
    settings = read_json(folder / "config.json").get("quantization_config")
    try:
        bnb_files.check_settings(settings)
        tensors = weights.read_tensors(folder, device=device)
        config = weights.untie(config, tensors)
        with torch.device("meta"):
            model = GPT(config)
        codes = {path: _take(path, tensors) for path in _linear(model)}
        codes = {path: found for path, found in codes.items() if found}
        if not codes:
            raise WeightsError(f"{folder} holds no codes: config.json says that it is quantized")
        tensors = {name: tensor.to(dtype=dtype) for name, tensor in tensors.items()}
        weights.check_tensors(model, tensors, folder)
        model.load_state_dict(weights.level(tensors), assign=True)
        for path, found in codes.items():
            bias = cast(Tensor, model.get_submodule(path).bias)
            model.set_submodule(path, bnb_files.to_layer(path, found, bias, settings))
    except WeightsError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder} has codes that bitsandbytes did not write: {error}"
        ) from error
    return model.requires_grad_(False).eval()


def _take(path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take a quantized layer's tensors out; to the check of shapes a float one stands in for them.

    Empty for a layer that was left in floats.
    """
    names = [n for n in tensors if n.startswith(f"{path}.") and n != f"{path}.bias"]
    found = {name.removeprefix(f"{path}."): tensors[name] for name in names}
    shape = bnb_files.shape_of(found)
    if shape is None:
        return {}
    for name in names:
        del tensors[name]
    like = tensors.get(f"{path}.bias", torch.empty(0))
    tensors[f"{path}.weight"] = torch.empty(shape[::-1], device="meta", dtype=like.dtype)
    return found


def _linear(model: GPT) -> dict[str, Conv1D]:
    return {p: m for p, m in model.h.named_modules(prefix="h") if isinstance(m, Conv1D)}


def _quantized(model: GPT) -> dict[str, Quantized]:
    return {p: m for p, m in model.h.named_modules(prefix="h") if isinstance(m, Quantized)}


def _floats(model: GPT) -> dict[str, Tensor]:
    """What is no code; ValueError for what a plain model does not have."""
    with torch.device("meta"):
        plain = GPT(model.config).state_dict()
    codes = {f"{path}.{name}" for path, m in _quantized(model).items() for name in m.state_dict()}
    biases = {f"{path}.bias" for path in _quantized(model)}
    floats = {n: t for n, t in model.state_dict().items() if n not in codes - biases}
    foreign = [name for name in floats if name not in plain]
    if foreign:
        raise ValueError(
            f"the model holds {foreign[0]}: take off what wraps its layers, or merge it into the "
            "float model"
        )
    return floats


def _check_model(model: GPT) -> None:
    """Raise ValueError unless all of the model's layers are plain floats that can be quantized."""
    if _quantized(model):
        raise ValueError("the model is quantized already: quantize the float model it was made of")
    for name, tensor in _floats(model).items():
        if tensor.dtype not in FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(f"weights must be {names}, got {name} in {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"weights must be numbers, got NaN or infinity in {name}")


def _check_settings(kind: str, block_size: int, double_quant: bool, threshold: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size must be one of {sizes}, got {block_size!r}")
    if kind == "int8" and (double_quant or block_size != 64):
        raise ValueError("double_quant and block_size are for 4 bits: int8 scales whole rows")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold must be a number of 0 or more, got {threshold}")
