"""What several tests need: a quiet, offline environment and small random checkpoints."""

import os

os.environ |= {
    "OMP_WAIT_POLICY": "passive",  # on a busy machine, waiting threads would spin the time away
    "HF_HUB_OFFLINE": "1",  # set before anything of Hugging Face is imported
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes compiles its fallbacks, for a minute
}

from pathlib import Path

import pytest
import torch
from parity import Pair, new_pair, small_config

from chatbot.tutor.corpus import CHAT_TEMPLATE, SPECIAL_TOKENS
from minigpt import GPT, GPTConfig, Tokenizer
from minigpt.tokenizer import train as train_tokenizer

torch.set_num_threads(2)

TEXTS = [
    "¿Qué es la caché KV?",
    "The attention of a model, the model's attention.",
    "Hola, ¿qué tal?",
]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random GPT-2 in float64: ours, transformers', and the directory both were loaded from."""
    return new_pair(tmp_path_factory.mktemp("checkpoint"), small_config())


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small byte-level BPE with the tutor's special tokens and chat template."""
    trained = train_tokenizer(TEXTS * 4, vocab_size=300, special_tokens=SPECIAL_TOKENS)
    trained.chat_template = CHAT_TEMPLATE
    return trained


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model directory as the tutor's, with random weights."""
    folder = tmp_path_factory.mktemp("chat_model")
    config = GPTConfig(
        vocab_size=300,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT(config, generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
