"""Beside the steps: where a model's files are, and how new ones are written.

A name is a directory if there is one, else a hub id, looked up in huggingface_hub's cache first:
what is there is never downloaded again. Only safetensors and text files are fetched, nothing that
could run code.

Twin: hf_bridge/files.py.  Proof: tests/test_files.py.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = [  # what stays the same when the weights change
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TEXTS]


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
    return _cached(name) or _download(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or the shards that its index names.

    Raises WeightsError if there are none, if a shard is missing, or if only pickled weights are
    there.
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


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: whoever looks sees the old content or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a model is for all who may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_tensors(
    tensors: Mapping[str, "Tensor"], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"format": "pt", **(metadata or {})},
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # the library makes it private
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _cached(repo_id: str) -> Path | None:
    """The hub cache's copy, if it is whole: other programs fetch weights without a tokenizer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=WANTED, local_files_only=True))
        weight_files(folder)
    except (HFValidationError, LocalEntryNotFoundError, WeightsError):
        return None
    names = {path.name for path in folder.iterdir()}
    tokenizer = "tokenizer.json" in names or names >= {"vocab.json", "merges.txt"}
    return folder if tokenizer and "config.json" in names else None


def _download(repo_id: str) -> Path:
    """Fetch a model from the hub into huggingface_hub's cache, with its progress bars.

    Where the hub is out of reach, the library gives what the cache has of it.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=WANTED))
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{repo_id} is gated: accept its licence on the hub and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise WeightsError(
            f"no model {repo_id!r} on the hub and no such directory, or it is private: "
            "check the name, or set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{repo_id!r} is neither a directory nor a hub id") from error
    except errors.LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{repo_id!r} is no directory, not in the cache, and the hub cannot be reached: "
            "go online once, or give a directory"
        ) from error
    except OSError:
        raise
    except Exception as error:  # the hub client's transport errors are not OSErrors
        raise OSError(f"download of {repo_id} failed, run the command again: {error}") from error
