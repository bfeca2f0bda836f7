"""Step 1: the numbers that define a GPT-2.

Radford et al. 2019, table 2, gives the sizes; the field names are those of the published
config.json.

Before: nothing.  After: tokenizer.py.  Twin: hf_bridge/config.py.  Proof: tests/test_config.py.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minigpt.files import read_json

# What these fields may say. Any other value is another model, with the same shapes.
FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and constants of one model; the defaults are GPT-2 small's.

    Raises ValueError at construction if a number makes no model.

    >>> GPTConfig(n_embd=768, n_head=12).head_size
    64
    >>> GPTConfig(n_embd=768, n_head=7)
    Traceback (most recent call last):
    ValueError: n_embd must be a multiple of n_head, got n_embd=768, n_head=7
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            _check_count(name, getattr(self, name))
        if self.n_inner is not None:
            _check_count("n_inner", self.n_inner)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, "
                f"got n_embd={self.n_embd}, n_head={self.n_head}"
            )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            probability = getattr(self, name)
            if not 0 <= probability < 1:
                raise ValueError(f"{name} must be in [0, 1), got {probability}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """The hidden width of the MLP: n_inner, or 4 C where the file does not say."""
        return self.n_inner or 4 * self.n_embd


def from_dict(published: Mapping[str, Any]) -> GPTConfig:
    """Read a published config.json; fields that do not change the mathematics are ignored.

    Raises ValueError for a model that is not a GPT-2 of this form.

    >>> from_dict({"n_embd": 8, "n_head": 2, "summary_type": "cls_index"}).n_embd
    8
    >>> from_dict({"model_type": "bert"})
    Traceback (most recent call last):
    ValueError: model_type must be gpt2, got 'bert'
    """
    for name, allowed in FIXED.items():
        if published.get(name, allowed[0]) not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must be {choices}, got {published[name]!r}")
    known = {field.name for field in fields(GPTConfig)}
    eos = published.get("eos_token_id")
    if isinstance(eos, list):  # newer files may list several ends; the first one is the tokenizer's
        published = {**published, "eos_token_id": eos[0] if eos else None}
    return GPTConfig(**{name: value for name, value in published.items() if name in known})


def to_dict(config: GPTConfig) -> dict[str, Any]:
    """The fields of a config.json that transformers reads as the same model.

    >>> to_dict(GPTConfig(n_layer=2))["model_type"], to_dict(GPTConfig(n_layer=2))["n_layer"]
    ('gpt2', 2)
    """
    fixed = {name: allowed[0] for name, allowed in FIXED.items()}
    return {"architectures": ["GPT2LMHeadModel"], **fixed, **asdict(config)}


def read(folder: str | Path) -> GPTConfig:
    """The configuration in `folder`/config.json.

    Raises ValueError if the file is missing, is not JSON, or describes another kind of model.
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


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
