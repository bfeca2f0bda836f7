"""Beside the steps: where a model's files are, by huggingface_hub.

transformers would look a name up by itself, but it asks the network even for what is cached, and
says of a wrong path that it is no repository. So: a directory first, then the cache, then the hub.

Twin: minigpt/files.py.  Proof: tests/test_files.py.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError

TEXTS = [  # what stays the same when the weights change
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TEXTS]
# Most special first: GatedRepoError is a RepositoryNotFoundError.
SENTENCES = {
    (errors.GatedRepoError,): "{0} is gated: accept its licence on the hub and set HF_TOKEN",
    (errors.RepositoryNotFoundError, errors.RevisionNotFoundError): (
        "no model {0!r} on the hub and no such directory, or it is private: "
        "check the name, or set HF_TOKEN"
    ),
    (errors.HFValidationError,): "{0!r} is neither a directory nor a hub id",
    (errors.LocalEntryNotFoundError,): (
        "{0!r} is no directory, not in the cache, and the hub cannot be reached: "
        "go online once, or give a directory"
    ),
}


class WeightsError(ValueError):
    """A model's files cannot be used; the message names the file, the tensor, and what to do."""


def resolve(name_or_path: str | Path) -> Path:
    """The directory of a model: itself, or the cached or freshly downloaded files of a hub id.

    Raises WeightsError if it is neither, OSError if a download breaks off.
    """
    name = str(name_or_path)
    folder = Path(os.path.expanduser(name))  # Path.expanduser raises for a user unknown
    if name and folder.is_dir():  # an empty name would be the working directory
        return folder
    if folder.is_file():
        raise WeightsError(f"{name} is a file: give the directory that holds config.json")
    if name.startswith((".", "~", os.sep)) or "\\" in name or name.count("/") > 1 or not name:
        raise WeightsError(f"no directory {name!r}: check the path")
    try:
        cached = Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
        weight_files(cached)
        names = {path.name for path in cached.iterdir()}
        tokenizer = "tokenizer.json" in names or names >= {"vocab.json", "merges.txt"}
        if tokenizer and "config.json" in names:
            return cached
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, WeightsError):
        pass  # not there, or not whole
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))  # out of reach: what is cached
    except Exception as error:
        for kinds, sentence in SENTENCES.items():
            if isinstance(error, kinds):
                raise WeightsError(sentence.format(name)) from error
        if isinstance(error, OSError):
            raise
        raise OSError(f"download of {name} failed, run the command again: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, which transformers will read.

    Raises WeightsError if there are none; transformers would go on to look for pickled ones.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        names = sorted(map(str, set(shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise WeightsError(f"{index} must name files beside itself, got {names}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise WeightsError(f"{index} names files that are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    if any(folder.glob("*.bin")):
        raise WeightsError(
            f"{folder} holds only pickled weights (.bin), which can run code: "
            "convert them to model.safetensors first"
        )
    raise WeightsError(f"{folder} has no weights: model.safetensors is missing")


def copy_texts(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings, as far as they are there."""
    for name in TEXTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A directory to write into; what is there at the end moves into `folder`, file by file.

    The libraries write in place: a full disk would leave half of a file where a whole one was.
    Raises OSError, and `folder` stays as it was, if something cannot be written.
    """
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in filter(Path.is_file, part.rglob("*")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in part.iterdir():
            os.replace(path, folder / path.name)
    except (SafetensorError, RuntimeError) as error:  # a full disk, as these and torch.save tell it
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
