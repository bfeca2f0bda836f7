"""What a figure depends on besides the code: the machine, the versions, the command.

Proof: tests/test_bench.py.
"""

import hashlib
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Machine, threads, versions, commit (with a + if files differ from it) and command line."""
    import torch

    changed = _git("status", "--short", "--untracked-files=no")
    return {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": (_git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else ""),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch compute with so many threads meanwhile; None: with as many as it does now."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sha256(path: Path) -> str:
    """The hash of a file's bytes, by which weights are known."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def peak_memory() -> int:
    """The most bytes that this process has held in memory at once."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found:  # getrusage would count what the parent held when it started this process
        return int(found[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
