"""Beside step 13: text files to clean documents, by the normalizers of tokenizers.

The course's own tool for this is the `datasets` library; generators over files serve as well. A
plain text must fit in memory here, and so must a line of a .jsonl; a corpus need not.

Twin: minigpt/corpus.py.  Proof: tests/test_data.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, normalizers

SUFFIXES = (".txt", ".md", ".jsonl")
_SPELLING = [
    normalizers.Replace(Regex(r"\r\n?"), "\n"),
    normalizers.Replace(Regex(r"[\x{0}-\x{8}\x{b}-\x{1f}\x{7f}-\x{9f}\x{feff}]"), ""),
]
_NFC = normalizers.Sequence([*_SPELLING, normalizers.NFC()])
_ASCII = normalizers.Sequence(
    [*_SPELLING, normalizers.NFKD(), normalizers.Replace(Regex(r"[^\x{0}-\x{7f}]"), "")]
)


def clean(text: str, *, ascii_only: bool = False) -> str:
    r"""One spelling for what looks the same, by the library's normalizers.

    >>> clean("cafe\u0301\r\n\x07"), clean("¿Años? 日", ascii_only=True)
    ('café\n', 'Anos? ')
    """
    return (_ASCII if ascii_only else _NFC).normalize_str(text)


def find_files(path: str | Path) -> list[Path]:
    """The text files of a directory and those below it, in order; or the file itself."""
    name, path = str(path), Path(path)
    if path.is_file():
        return [path]
    if not name or not path.is_dir():  # an empty name would be the working directory
        raise ValueError(f"no file or directory {name!r}: check the path")
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"{path} holds no text: no file ends in {', '.join(SUFFIXES)}")
    return files


def read_documents(path: str | Path, *, ascii_only: bool = False) -> Iterator[Iterator[str]]:
    """Clean documents, each in one piece: a file, or a {"text": ...} line of a .jsonl."""
    for file in find_files(path):
        for text in (t for (t,) in _rows(file)) if file.suffix == ".jsonl" else [_read(file)]:
            yield iter([clean(text, ascii_only=ascii_only)])


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """Examples for fine-tuning, as (prompt, completion); the prompt of a plain text is empty."""
    for file in find_files(path):
        if file.suffix == ".jsonl":
            for *prompt, completion in _rows(file, pairs=True):
                yield "".join(prompt), completion
        else:
            parts = re.split(r"\n\s*\n", clean(_read(file)))
            yield from (("", part.strip()) for part in parts if part.strip())


def _rows(file: Path, *, pairs: bool = False) -> Iterator[list[str]]:
    """The texts of each line of a .jsonl that is not blank: one, or a prompt and its completion."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            texts, name = [], "text"
            try:
                row = json.loads(line)
                names = ["prompt", "completion"] if pairs and "completion" in row else ["text"]
                for name in names:
                    texts.append(clean(row[name]))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                got = line[:40].decode(errors="replace").strip()
                raise ValueError(f'{file}:{number} must be {{"{name}": …}}, got {got!r}') from error
            yield texts


def _read(file: Path) -> str:
    content = file.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{file} must be text, got a zero byte at {content.index(0)}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise ValueError(
            f"{file} must be UTF-8 text, got byte {wrong:#04x} at {error.start}"
        ) from error
