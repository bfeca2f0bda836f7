"""Step 16 through transformers: hooks, and an attention function of our own that calls `eager`.

output_hidden_states gives the residual stream only, and output_attentions the patterns, of eager
attention only (of sdpa an empty tuple). The rest is heard by hooks, whose names differ from
minigpt's by where the library keeps its modules; q, k, v and scores by registering, for the time
of one forward, an attention function under a name of its own, with the float mask it must have.

Before: metrics.py.  After: engine.py.  Twin: minigpt/trace.py.  Proof: tests/test_trace.py.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from hf_bridge.mask import _rule
from hf_bridge.model import GPT

Put = Callable[[str, Tensor], None]
NAME = "eager_traced"
OUTSIDE = (  # name, module, and which side of it: what goes in or what comes out
    ("wte", "wte", "out"),
    ("wpe", "wpe", "out"),
    ("embeddings", "drop", "out"),
    ("ln_f", "ln_f", "out"),
)
BLOCK = (
    ("ln_1", "ln_1", "out"),
    ("attn.c_proj", "attn.c_proj", "out"),
    ("residual_1", "ln_2", "in"),
    ("ln_2", "ln_2", "out"),
    ("mlp.c_fc", "mlp.c_fc", "out"),
    ("mlp.gelu", "mlp.act", "out"),
    ("mlp.c_proj", "mlp.c_proj", "out"),
    ("residual_2", "", "out"),
)


@torch.no_grad()
def trace(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    """Run the model once and return what it computed; names and shapes as in minigpt.

    Where transformers adds the least number of the dtype to a hidden score, -inf is shown.
    """
    seen: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.detach()

    with ExitStack() as stack:  # undone at the end, also when the forward fails
        for name, module, side in _points(model):
            stack.enter_context(_listen(module, side, name, put))
        stack.callback(model.hf.set_attn_implementation, model.hf.config._attn_implementation)
        stack.callback(ALL_ATTENTION_FUNCTIONS.pop, NAME)
        ALL_ATTENTION_FUNCTIONS[NAME] = _recording(put)  # `register` would keep the tensors alive
        AttentionMaskInterface.register(NAME, _mask(model))  # not registered: no mask, silently
        model.hf.set_attn_implementation(NAME)
        put("logits", model(ids))
    seen["wpe"] = seen["wpe"].expand_as(seen["wte"])
    return seen


class _Softmax(TorchFunctionMode):
    """Remembers what the softmax of the code under it was given, and what it gave."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self.scores, self.pattern = args[0], result
        return result


def _recording(put: Put) -> Callable[..., tuple[Tensor, Tensor]]:
    """`eager`, that tells what it sees on its way: q, k, v (B, H, T, D) -> (B, T, H, D)."""

    def recording(
        layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        with _Softmax() as softmax:
            heads, pattern = eager_attention_forward(layer, q, k, v, mask, **options)
        hidden = softmax.scores <= torch.finfo(mask.dtype).min / 2
        scores = softmax.scores.masked_fill(hidden, -math.inf)
        found = {"q": q, "k": k, "v": v, "scores": scores, "pattern": softmax.pattern}
        for part, tensor in (*found.items(), ("heads", heads.transpose(1, 2))):
            put(f"h.{layer.layer_idx}.attn.{part}", tensor)
        return heads, pattern

    return recording


def _mask(model: GPT) -> Callable[..., Tensor]:
    """The mask function that belongs to it: causal, or the model's window."""
    window = _rule(model.sliding_window, model.attention_sinks)
    return lambda mask_function, **options: eager_mask(mask_function=window, **options)


def _points(model: GPT) -> Iterator[tuple[str, nn.Module, str]]:
    """All places to listen at: name, module and side."""
    for name, path, side in OUTSIDE:
        yield name, model.hf.transformer.get_submodule(path), side
    for i, block in enumerate(model.hf.transformer.h):
        for name, path, side in BLOCK:
            yield f"h.{i}.{name}", block.get_submodule(path), side


def _listen(module: nn.Module, side: str, name: str, put: Put) -> Any:
    """Hook on to a module; the handle takes the hook away again when its `with` ends."""
    if side == "in":
        return module.register_forward_pre_hook(lambda module, inputs: put(name, inputs[0]))
    return module.register_forward_hook(lambda module, inputs, output: put(name, output))
