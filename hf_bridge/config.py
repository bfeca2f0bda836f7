"""Step 1 through transformers: GPT2Config, held to the same rules.

GPT2Config has the same field names and checks their types, but not their sense: 7 heads in 768
columns are refused only when a model is built, a negative width not even then by name. Its other
fields (summaries, cross-attention, …) stay at their defaults.

Before: nothing.  After: tokenizer.py.  Twin: minigpt/config.py.  Proof: tests/test_config.py.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from hf_bridge.files import read_json

FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


class GPTConfig(GPT2Config):
    """A GPT2Config; raises ValueError at construction if a number makes no model.

    >>> GPTConfig(n_embd=768, n_head=7)
    Traceback (most recent call last):
    ValueError: n_embd must be a multiple of n_head, got n_embd=768, n_head=7
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        layer_norm_epsilon: float = 1e-5,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        resid_pdrop: float = 0.1,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = 50256,
        eos_token_id: int | None = 50256,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name, value in given.items():
            _check(name, value)
        if n_embd % n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got n_embd={n_embd}, n_head={n_head}"
            )
        super().__init__(**given)

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """The hidden width of the MLP."""
        return self.n_inner or 4 * self.n_embd


def from_dict(published: Mapping[str, Any]) -> GPTConfig:
    """Read a published config.json; ValueError for a model that is not a GPT-2 of this form."""
    for name, allowed in FIXED.items():
        if published.get(name, allowed[0]) not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must be {choices}, got {published[name]!r}")
    known = {
        name: published[name] for name in inspect.signature(GPTConfig).parameters & published.keys()
    }
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = next(iter(known["eos_token_id"]), None)
    return GPTConfig(**known)


def to_dict(config: GPTConfig) -> dict[str, Any]:
    """The fields of a config.json that transformers reads as the same model."""
    return {"architectures": ["GPT2LMHeadModel"], **config.to_diff_dict()}


def read(folder: str | Path) -> GPTConfig:
    """The configuration in `folder`/config.json, or ValueError.

    GPT2LMHeadModel.from_pretrained would take a missing file for GPT-2 small.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: a model directory holds config.json and its weights")
    published = read_json(path)
    if not isinstance(published, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(published).__name__}")
    try:
        return from_dict(published)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check(name: str, value: Any) -> None:
    if name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        right, rule = type(value) is int and value >= 1, "a whole number of at least 1"
        right, value = right or (name == "n_inner" and value is None), repr(value)
    elif name.endswith("pdrop"):
        right, rule = 0 <= value < 1, "in [0, 1)"
    elif name in ("layer_norm_epsilon", "initializer_range"):
        right, rule = math.isfinite(value) and value > 0, "a positive number"
    else:
        return
    if not right:
        raise ValueError(f"{name} must be {rule}, got {value}")
