"""Step 16: look inside. Every tensor of a forward, by name.  (B, T) ids -> {name: tensor}

    wte, wpe, embeddings
    h.0.ln_1   h.0.attn.q, .k, .v, .scores, .pattern, .heads, .c_proj   h.0.residual_1
    h.0.ln_2   h.0.mlp.c_fc, .gelu, .c_proj   h.0.residual_2   …   ln_f, logits

Nothing is computed a second time, which could drift from the model: hooks listen to its modules,
and a mode of PyTorch's to the softmax of `attend`, which stands in for the fused kernel meanwhile.
How it is shown: picture.py.

Before: metrics.py.  After: engine.py.  Twin: hf_bridge/trace.py.  Proof: tests/test_trace.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt.attention import Attend, Attention, attend
from minigpt.model import GPT

Put = Callable[[str, Tensor], None]
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
    ("mlp.gelu", "mlp.c_proj", "in"),
    ("mlp.c_proj", "mlp.c_proj", "out"),
    ("residual_2", "", "out"),
)


@torch.no_grad()
def trace(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    """Run the model once and return what it computed, in that order; the model stays as it was.

    q, k, v and heads are (B, H, T, D). The scores are (B, H, T, T), after the division by sqrt(D)
    and with -inf where a key is hidden; the pattern is their softmax, before dropout. gelu is what
    enters mlp.c_proj, residual_1 what enters ln_2, and the c_proj stand before dropout. Each
    position sees what model.sliding_window lets it see. Errors as in the model's forward.

    >>> from minigpt import GPTConfig
    >>> model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2))
    >>> seen = trace(model, torch.tensor([[1, 2, 3]]))
    >>> tuple(seen["h.0.attn.scores"].shape), tuple(seen["logits"].shape)
    ((1, 2, 3, 3), (1, 3, 11))
    """
    seen: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.detach()

    with ExitStack() as stack:  # undone at the end, also when the forward fails
        for name, module, side in _points(model):
            stack.enter_context(_listen(module, side, name, put))
        for layer in model.modules():
            if isinstance(layer, Attention):
                stack.callback(setattr, layer, "attend", layer.attend)
                layer.attend = _recording(f"h.{layer.layer}.attn", put)
        put("logits", model(ids))
    seen["wpe"] = seen["wpe"].expand_as(seen["wte"])  # one row of positions serves the batch
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


def _recording(name: str, put: Put) -> Attend:
    """`attend` for one layer, that tells what it sees on its way."""

    def recording(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        with _Softmax() as softmax:
            heads = attend(q, k, v, mask, dropout)
        found = {"q": q, "k": k, "v": v, "scores": softmax.scores, "pattern": softmax.pattern}
        for part, tensor in (*found.items(), ("heads", heads)):
            put(f"{name}.{part}", tensor)
        return heads

    return recording


def _points(model: GPT) -> Iterator[tuple[str, nn.Module, str]]:
    """All places to listen at: name, module and side."""
    for name, path, side in OUTSIDE:
        yield name, model.get_submodule(path), side
    for i, block in enumerate(model.h):
        for name, path, side in BLOCK:
            yield f"h.{i}.{name}", block.get_submodule(path), side


def _listen(module: nn.Module, side: str, name: str, put: Put) -> Any:
    """Hook on to a module; the handle takes the hook away again when its `with` ends."""
    if side == "in":
        return module.register_forward_pre_hook(lambda module, inputs: put(name, inputs[0]))
    return module.register_forward_hook(lambda module, inputs, output: put(name, output))
