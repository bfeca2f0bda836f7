"""What a chat needs of a model, and how to open one; all else about models stays behind this.

Both packages fulfil it with a class `Engine` of their own. They are imported late and by name:
to talk to one costs nothing of the other.

Proof: tests/test_conversation.py, tests/test_chatbot_cli.py.
"""

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

TUTOR = Path(__file__).parent / "tutor"  # the model that comes with this repository
ENGINES = {"minigpt": "minigpt.engine", "hf": "hf_bridge.engine"}

Message = Mapping[str, str]  # role (system, user or assistant) and content


class StreamDecoder(Protocol):
    """Ids one by one -> text, never half a character."""

    def feed(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Engine(Protocol):
    """A model that speaks: messages in, token ids out.

    `stop` are texts that end a reply besides the model's own end token; `reused` says how many
    tokens of the last prompt were not computed again.
    """

    name: str
    context_length: int
    stop: tuple[str, ...]
    reused: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream_decoder(self) -> StreamDecoder: ...

    def render(self, messages: Sequence[Message]) -> list[int]: ...

    def stream(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int | None,
    ) -> Iterator[int]:
        """Token after token without the end token; closing the iterator stops the model."""
        ...


def open_engine(
    name: str,
    model: str | Path,
    *,
    sliding_window: int | None = None,
    attention_sinks: int = 0,
    adapter: str | Path | None = None,
) -> Engine:
    """Load `model`, a directory or a hub id, and `adapter` onto it, with one of ENGINES.

    Raises ValueError for a model that cannot be used, OSError if a download breaks off,
    ImportError if the engine's packages are not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be {' or '.join(ENGINES)}, got {name!r}")
    module = importlib.import_module(ENGINES[name])
    return module.Engine.from_pretrained(
        model, sliding_window=sliding_window, attention_sinks=attention_sinks, adapter=adapter
    )


def display_name(model: str | Path) -> str:
    """How people call a model: the last part of its path or hub id."""
    folder = Path(model)
    return (folder.resolve() if folder.is_dir() else folder).name


def generation_config(model: str | Path) -> dict[str, Any]:
    """What the model's makers advise for drawing replies, as published; empty if nothing.

    Of a hub id only the copy in the cache is read, which is there once the model was opened.
    Raises ValueError if the file is damaged.
    """
    folder = Path(os.path.expanduser(model))  # Path.expanduser raises for an unknown ~user
    path: Path | str | None = folder / "generation_config.json"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(model), "generation_config.json")
        path = cached if isinstance(cached, str) else None
    if path is None or not Path(path).is_file():
        return {}
    try:
        published = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(published, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(published).__name__}")
    return published
