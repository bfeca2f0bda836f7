"""Where models come from: directories, the cache, and a hub emulated on the loopback interface."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

import hf_bridge.files
import hf_bridge.peft_files
import minigpt.peft_files
from minigpt import files
from minigpt.files import read_json, resolve, write_atomically

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that huggingface_hub needs, for models in `repositories`."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            files = self.repositories.get(name)
            if name == "org/gated":
                self.refuse(403, "GatedRepo")
            elif files is None:
                self.refuse(404, "RepoNotFound")
            elif "/tree/" in path:
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": "0"}
                    for n, c in files.items()
                ]
                self.send(json.dumps(tree).encode(), with_body=with_body)
            else:
                siblings = [{"rfilename": name} for name in files]
                info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False}
                self.send(json.dumps(info).encode(), with_body=with_body)
        elif "/resolve/" in path:
            name, file = path[1:].split("/resolve/")
            content = self.repositories.get(name, {}).get(file.split("/", 1)[1])
            if content is None:
                self.refuse(404, "EntryNotFound")
            else:
                cut = name == "org/cut" and file.endswith("safetensors")
                self.send(content, with_body=with_body, cut=cut)
        else:
            self.refuse(404, "RepoNotFound")

    def send(self, content: bytes, *, with_body: bool, cut: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{abs(hash(content)):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True

    def refuse(self, code: int, error: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(pair) -> Iterator[str]:
    """The address of a hub with a whole model, one without safetensors, and one that breaks off."""
    files = {path.name: path.read_bytes() for path in pair.folder.iterdir()}
    weights = {"model.safetensors": files["model.safetensors"]}
    Hub.repositories = {
        "org/whole": {**files, "tokenizer.json": b"{}", "pytorch_model.bin": b"never fetched"},
        "org/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"x"},
        "org/cut": {"config.json": files["config.json"], **weights},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOAD = """
import sys; from minigpt import GPT
try: print(GPT.from_pretrained(sys.argv[1]).config.n_layer)
except (ValueError, OSError) as error: print(type(error).__name__, error)
"""
RESOLVE = """
import sys; from {side}.files import resolve
print(*sorted(path.name for path in resolve(sys.argv[1]).iterdir()))
"""


def load(
    model: str, home: Path, hub: str | None, code: str = LOAD
) -> subprocess.CompletedProcess[str]:
    """Load a model in a process of its own, with this hub (None: offline) and cache."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment |= {"HF_ENDPOINT": hub} if hub else {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, model],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_nothing_that_could_run_code(
    hub: str, tmp_path: Path
) -> None:
    first = load("org/whole", tmp_path, hub)
    assert first.stdout == "3\n", first.stderr
    assert not any(request.endswith(".bin") for request in Hub.requests)
    Hub.requests.clear()
    assert load("org/whole", tmp_path, hub).stdout == "3\n"
    assert not [request for request in Hub.requests if "/resolve/" in request]
    assert load("org/whole", tmp_path, None).stdout == "3\n"  # offline too


@pytest.mark.slow
@pytest.mark.parametrize("side", ["minigpt", "hf_bridge"])
def test_a_cached_model_is_completed_by_its_tokenizer_or_taken_as_it_is(
    hub: str, tmp_path: Path, side: str
) -> None:
    snapshot = tmp_path / "hub/models--org--whole/snapshots" / COMMIT  # as transformers leaves it
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes(Hub.repositories["org/whole"][name])
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(COMMIT)
    code = RESOLVE.format(side=side)
    for reach, names in (
        (None, "config.json model.safetensors\n"),
        (hub, "config.json generation_config.json model.safetensors tokenizer.json\n"),
    ):
        done = load("org/whole", tmp_path, reach, code)
        assert done.stdout == names, done.stderr
    Hub.requests.clear()
    assert load("org/whole", tmp_path, hub, code).stdout == names
    assert not Hub.requests


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/missing", "WeightsError no model 'org/missing' on the hub and no such directory"),
        ("org/gated", "WeightsError org/gated is gated: accept its licence on the hub"),
        ("org/pickled", "has no weights: model.safetensors is missing"),
    ],
)
def test_what_the_hub_cannot_give_is_one_clear_line(
    hub: str, tmp_path: Path, model: str, message: str
) -> None:
    done = load(model, tmp_path, hub)
    assert message in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
def test_a_transfer_that_breaks_off_leaves_nothing_half_written(hub: str, tmp_path: Path) -> None:
    done = load("org/cut", tmp_path, hub)
    assert done.stdout.startswith("OSError"), done.stdout + done.stderr
    assert "run the command again" in done.stdout
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))


@pytest.mark.slow
def test_offline_and_not_cached_says_what_to_do(tmp_path: Path) -> None:
    done = load("org/whole", tmp_path, None)
    assert "the hub cannot be reached: go online once, or give a directory" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"no directory './nowhere': check the path"),
        ("~nobody-here/x", "no directory '~nobody-here/x': check the path"),
        ("/no/such/place", "no directory '/no/such/place': check the path"),
        ("a/b/c", "no directory 'a/b/c': check the path"),
        ("", "no directory '': check the path"),
        (__file__, r"is a file: give the directory that holds config\.json"),
        ("bad name!", "'bad name!' is neither a directory nor a hub id"),
    ],
)
def test_a_path_that_is_none_is_never_taken_for_a_hub_id(name: str, message: str) -> None:
    for step in (files, hf_bridge.files):
        with pytest.raises(step.WeightsError, match=message):
            step.resolve(name)


@pytest.mark.parametrize("side", [minigpt, hf_bridge], ids=["minigpt", "hf_bridge"])
def test_an_adapters_base_may_lie_with_a_user_unknown_here(side) -> None:
    side.peft_files.check_base(Path("x"), "~nobody-here/gpt2", "org/gpt2")
    with pytest.raises(ValueError, match="made for the base '~nobody-here/a', not 'gpt2'"):
        side.peft_files.check_base(Path("x"), "~nobody-here/a", "gpt2")


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_names_no_shards_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    for step in (files, hf_bridge.files):
        with pytest.raises(ValueError, match=r"index.json (must name files|names files that are)"):
            step.weight_files(tmp_path)


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")
