"""Step 1: transformers reads our config.json as the same model; no other model is accepted."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from minigpt import GPTConfig
from minigpt.config import from_dict, read, to_dict

SHARED = [
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon",
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range", "tie_word_embeddings",
    "bos_token_id", "eos_token_id",
]  # fmt: skip


def test_the_defaults_are_transformers_defaults() -> None:
    ours, theirs = GPTConfig(), GPT2Config()
    assert {n: getattr(ours, n) for n in SHARED} == {n: getattr(theirs, n) for n in SHARED}


def test_a_config_goes_to_transformers_and_back(tmp_path: Path) -> None:
    ours = GPTConfig(vocab_size=97, n_embd=48, n_head=4, n_inner=80, eos_token_id=None)
    theirs = GPT2Config(**{k: v for k, v in to_dict(ours).items() if k != "architectures"})
    theirs.save_pretrained(tmp_path)
    assert read(tmp_path) == ours


def test_a_list_of_ends_gives_the_first() -> None:
    assert from_dict({"eos_token_id": [3, 4]}).eos_token_id == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 5}, "n_embd must be a multiple of n_head, got n_embd=768, n_head=5"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1, got 0"),
        ({"n_embd": "768"}, "n_embd must be a whole number of at least 1, got '768'"),
        ({"attn_pdrop": 1.0}, r"attn_pdrop must be in \[0, 1\), got 1.0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a positive number, got 0.0"),
        ({"activation_function": "relu"}, "must be gelu_new or gelu_pytorch_tanh, got 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "must be False, got True"),
        ({"model_type": "llama"}, "model_type must be gpt2, got 'llama'"),
    ],
)
def test_what_makes_no_gpt2_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ("{", "config.json is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        (json.dumps({"n_layer": -1}), "config.json: n_layer must be"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
