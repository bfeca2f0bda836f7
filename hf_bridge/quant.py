"""Step 10 through bitsandbytes, as transformers calls it: BitsAndBytesConfig.

transformers quantizes while it loads, so the model's tensors are handed to from_pretrained anew.
What the bridge adds, because the libraries do without: NaN is an error, and so are shapes that
bitsandbytes 0.50 unpacks wrongly on a CPU; a loaded model's floats get one dtype, where biases and
embeddings would come in two; and the layers are kept from repacking themselves for CPUs with
AVX512-BF16 at the first forward, after which they compute in bfloat16 whatever was asked and can
neither train nor be saved exactly.

Before: generate.py.  After: lora.py.  Twin: minigpt/quant.py.  Proof: tests/test_quant.py.
"""

import math
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig, GPT2LMHeadModel
from transformers.generation import GenerationConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_bridge import config as config_step
from hf_bridge.files import WeightsError, read_json, resolve, weight_files, writing
from hf_bridge.model import GPT
from hf_bridge.weights import check_report, diagnose, quiet

KINDS = ("nf4", "fp4", "int8")
BLOCK_SIZE = 64  # transformers asks for no other
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

    Arguments and errors as in minigpt; blocks of another size than 64 cannot be had. The bar is
    the library's, of all that it loads.
    """
    _check_settings(kind, block_size, double_quant, threshold)
    _check_model(model, kind)
    four = kind != "int8"
    settings = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type=kind if four else "fp4",
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_threshold=threshold,
    )
    training, device, dtype = model.training, model.device, model.hf.dtype
    bar = progress and sys.stderr.isatty() and logging.is_progress_bar_enabled()
    with quiet():
        if bar:
            logging.enable_progress_bar()
        hf = GPT2LMHeadModel.from_pretrained(
            None,
            config=model.config,
            state_dict=model.hf.state_dict(),
            quantization_config=settings,
            dtype=dtype,
            device_map={"": device},
        )
    _install(model, hf, dtype)
    return model.requires_grad_(False).train(training)


def dequantize(model: GPT) -> GPT:
    """Replace quantized layers, in place, by float ones that hold what the codes stand for.

    Raises ValueError for a model with wrapped layers.
    """
    layers = _quantized(model)
    if not layers:
        return model
    _check_plain(model)
    for path, layer in layers.items():
        plain = Conv1D(layer.out_features, layer.in_features)
        state = layer.state if isinstance(layer, bnb.nn.Linear8bitLt) else None
        weight = dequantize_bnb_weight(layer.weight, state).T.contiguous()
        plain.weight, plain.bias = nn.Parameter(weight.to(layer.bias.dtype)), layer.bias
        model.hf.set_submodule(path, plain.requires_grad_(False).train(model.training))
    model.hf.is_quantized = False
    del model.hf.config.quantization_config, model.hf.hf_quantizer
    return model


def save(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors, each at one stroke.

    Raises ValueError for a model that is not quantized, or holds other wrapped layers.
    """
    if not _quantized(model):
        raise ValueError("the model is not quantized: quantize it first, or use save_pretrained")
    _check_plain(model)
    model.hf.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        with quiet(), writing(Path(folder)) as part:
            model.hf.save_pretrained(part)
    finally:
        model.hf.generation_config = GenerationConfig()


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """Read what `save` or minigpt wrote; GPT.from_pretrained comes here by itself."""
    folder = resolve(name_or_path)
    config = config_step.read(folder)
    settings = read_json(folder / "config.json").get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method != "bitsandbytes":
        raise WeightsError(f"quant_method must be bitsandbytes, got {method!r}")
    config.quantization_config = settings
    files = weight_files(folder)
    try:
        with quiet():
            hf, report = GPT2LMHeadModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                device_map={"": torch.device(device)},
                output_loading_info=True,
            )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder} has codes that bitsandbytes did not write: {error}"
        ) from error
    except Exception as error:
        raise WeightsError(diagnose(files, error)) from error
    check_report(folder, report)
    with torch.device("meta"):
        model = GPT(config)
    _install(model, hf, dtype or hf.transformer.wte.weight.dtype)
    for path, layer in _quantized(model).items():
        if not _whole(layer):
            raise WeightsError(
                f"{folder} has codes that bitsandbytes did not write: the parts of "
                f"{path.removeprefix('transformer.')} do not fit together"
            )
        if isinstance(layer, bnb.nn.Linear4bit):
            _check_inputs(path, layer.in_features, layer.weight.quant_state.blocksize)
    return model.requires_grad_(False).eval()


def _install(model: GPT, hf: GPT2LMHeadModel, dtype: torch.dtype) -> None:
    """Put a quantized model in the wrapper, with one dtype for all that is no code."""
    for layer in hf.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    window, sinks = getattr(model, "sliding_window", None), getattr(model, "attention_sinks", 0)
    model.hf = hf
    model._slide(window, sinks)


def _whole(layer: Any) -> bool:
    """Whether codes and scales are of the layer's size: bitsandbytes looks late, or reads on."""
    N, K = layer.out_features, layer.in_features
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = getattr(layer.weight, "SCB", None)
        return layer.weight.shape == (N, K) and scale is not None and scale.shape == (N,)
    state = getattr(layer.weight, "quant_state", None)
    return (
        state is not None
        and state.quant_type in KINDS
        and tuple(state.shape) == (N, K)
        and layer.weight.numel() == math.ceil(N * K / 2)
        and state.absmax.numel() == math.ceil(N * K / state.blocksize)
        and state.absmax.dtype == (torch.uint8 if state.nested else torch.float32)
    )


def _quantized(model: GPT) -> dict[str, nn.Module]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {path: m for path, m in model.hf.named_modules() if isinstance(m, kinds)}


def _check_plain(model: GPT) -> None:
    """Raise ValueError for layers that are neither GPT-2's nor bitsandbytes'."""
    with torch.device("meta"):
        plain = GPT(model.config).state_dict()
    codes = tuple(f"hf.{path}." for path in _quantized(model))
    for name in model.state_dict():
        if name not in plain and not name.startswith(codes):
            raise ValueError(
                f"the model holds {name.removeprefix('hf.transformer.')}: take off what wraps its "
                "layers, or merge it into the float model"
            )


def _check_model(model: GPT, kind: str) -> None:
    """Raise ValueError unless the model is a plain float one that bitsandbytes computes rightly."""
    if _quantized(model):
        raise ValueError("the model is quantized already: quantize the float model it was made of")
    _check_plain(model)
    for name, tensor in model.hf.transformer.state_dict().items():
        if tensor.dtype not in FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(f"weights must be {names}, got {name} in {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"weights must be numbers, got NaN or infinity in {name}")
    if kind != "int8":
        for path, layer in model.hf.named_modules():
            if isinstance(layer, Conv1D):
                _check_inputs(path, layer.weight.shape[0], BLOCK_SIZE)


def _check_inputs(path: str, inputs: int, block_size: int) -> None:
    if inputs % block_size and inputs % 2 == 0:
        raise ValueError(
            f"{path.removeprefix('transformer.')} has {inputs} inputs, no multiple of the block "
            f"size {block_size}: bitsandbytes would unpack them wrongly; use int8"
        )


def _check_settings(kind: str, block_size: int, double_quant: bool, threshold: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if block_size != BLOCK_SIZE:
        raise ValueError(f"block_size must be {BLOCK_SIZE} in transformers, got {block_size!r}")
    if kind == "int8" and double_quant:
        raise ValueError("double_quant and block_size are for 4 bits: int8 scales whole rows")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold must be a number of 0 or more, got {threshold}")
