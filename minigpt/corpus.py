"""Beside step 13: text files of any size to clean documents, in pieces that fit in memory.

    file -> UTF-8 -> one spelling for what looks the same -> pieces, cut where tokens end anyway

Twin: hf_bridge/corpus.py.  Proof: tests/test_data.py.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 20  # bytes read at once
SUFFIXES = (".txt", ".md", ".jsonl")
# Signs that no reader sees: C0 and C1 but for tab and newline, delete, the byte-order mark.
CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xFEFF])
# Here a text may be cut without changing its tokens: a word takes one space before it at most.
CUT = re.compile(r"(?<!\r)[ \n](\S)")


def clean(text: str, *, ascii_only: bool = False) -> str:
    r"""One spelling for what looks the same: NFC, newlines as \n, no control characters.

    `ascii_only` takes the accents off and drops what is still not ASCII, as old corpora do. In
    Spanish it makes other words.

    >>> clean("cafe\u0301\r\n\x07")
    'café\n'
    >>> clean("¿Años? 日", ascii_only=True)
    'Anos? '
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROL)
    if ascii_only:
        return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return unicodedata.normalize("NFC", text)


def find_files(path: str | Path) -> list[Path]:
    """The text files of a directory and those below it, in order; or the file itself.

    Raises ValueError if there are none.
    """
    name, path = str(path), Path(path)
    if path.is_file():
        return [path]
    if not name or not path.is_dir():  # an empty name would be the working directory
        raise ValueError(f"no file or directory {name!r}: check the path")
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{path} holds no text: no file ends in {', '.join(SUFFIXES)}")
    return files


def read_documents(path: str | Path, *, ascii_only: bool = False) -> Iterator[Iterator[str]]:
    """Clean documents, each in pieces. A file is one, and so is a {"text": ...} line of a .jsonl.

    The tokens of the pieces are those of the whole document. Raises ValueError for files that
    hold no UTF-8 text.
    """
    for file in find_files(path):
        if file.suffix == ".jsonl":
            for (text,) in _rows(file):
                yield iter([clean(text, ascii_only=ascii_only)])
        else:
            pieces = _pieces(file, ascii_only=ascii_only)
            yield (clean(piece, ascii_only=ascii_only) for piece in pieces)


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """Examples for fine-tuning, as (prompt, completion); the prompt of a plain text is empty.

    A line of a .jsonl holds {"prompt": ..., "completion": ...} or {"text": ...}; in other files
    an example is a paragraph. Raises ValueError, with file and line, for a line that holds neither.
    """
    for file in find_files(path):
        if file.suffix == ".jsonl":
            for *prompt, completion in _rows(file, pairs=True):
                yield "".join(prompt), completion
        else:
            whole = clean("".join(_pieces(file)))
            yield from (("", text.strip()) for text in re.split(r"\n\s*\n", whole) if text.strip())


def _pieces(file: Path, *, ascii_only: bool = False) -> Iterator[str]:
    """A file's text in pieces of about BLOCK bytes, cut where tokens end once it is clean."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            rest += _decode(decoder, block, file, stream.tell() - len(block))
            cuts = [
                match.start()
                for match in CUT.finditer(rest, max(0, len(rest) - 4096))
                if clean(match[1], ascii_only=ascii_only).strip()  # else the space goes on there
            ]
            if cuts:
                yield rest[: cuts[-1]]
                rest = rest[cuts[-1] :]
        yield rest + _decode(decoder, b"", file, stream.tell(), final=True)


def _decode(
    decoder: codecs.IncrementalDecoder, block: bytes, file: Path, start: int, final: bool = False
) -> str:
    if b"\0" in block:
        raise ValueError(f"{file} must be text, got a zero byte at {start + block.index(0)}")
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = start - pending + error.start
        wrong = error.object[error.start]
        raise ValueError(f"{file} must be UTF-8 text, got byte {wrong:#04x} at {place}") from error


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
                    texts[-1].encode()  # JSON can spell half of a surrogate pair: no character
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                got = line[:40].decode(errors="replace").strip()
                raise ValueError(f'{file}:{number} must be {{"{name}": …}}, got {got!r}') from error
            yield texts
