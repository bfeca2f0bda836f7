"""The laws of the house: one-way imports, a chain of steps, true twins, a true README."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"transformers", "peft", "bitsandbytes", "gradio", "accelerate", "tokenizers"}
FORBIDDEN = {
    "minigpt": HEAVY | {"hf_bridge", "chatbot", "bench", "answers", "tests"},
    "hf_bridge": {"minigpt", "chatbot", "bench", "answers", "gradio", "tests"},
    "chatbot": HEAVY | {"hf_bridge", "bench", "answers", "tests"},
    "bench": {"answers", "tests"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports anywhere, late ones too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        assert not imports(path) & FORBIDDEN[package], path


def test_the_chat_knows_a_model_only_by_its_engine() -> None:
    for path in (ROOT / "chatbot").glob("*.py"):  # the tutor's own folder trains with minigpt
        assert "minigpt" not in imports(path), path


@pytest.mark.parametrize("module", ["minigpt", "chatbot.__main__", "minigpt.engine"])
def test_importing_is_silent_and_light(module: str) -> None:
    code = f"import {module}, sys; print(*(sys.modules.keys() & {HEAVY | {'matplotlib'}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout.strip(), run.stderr) == ("", "")


def steps() -> list[str]:
    """The reading order that minigpt's docstring gives."""
    document = ast.get_docstring(ast.parse((ROOT / "minigpt/__init__.py").read_text("utf-8")))
    order = re.search(r"Read in this order: ([\w,\s]+)\.", document or "")
    assert order
    return [name.strip() for name in order[1].split(",")]


def beside() -> list[str]:
    """The modules that say of themselves that they are no step."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sources("minigpt")}
    return [name for name, text in texts.items() if text.startswith('"""Beside ')]


def test_the_reading_order_is_a_chain() -> None:
    order = steps()
    files = {path.stem for path in sources("minigpt")} - {"__init__", "__main__"}
    assert files == set(order) | set(beside())
    for i, name in enumerate(order):
        text = ast.get_docstring(ast.parse((ROOT / f"minigpt/{name}.py").read_text("utf-8"))) or ""
        before = f"{order[i - 1]}.py" if i else "nothing"
        after = f"{order[i + 1]}.py" if i + 1 < len(order) else "nothing"
        assert re.match(r"Step \d+: ", text), name
        assert f"Before: {before}.  After: {after}." in text, name
        assert f"Twin: hf_bridge/{name}.py.  Proof: tests/test_{name}.py." in text, name


@pytest.mark.parametrize("name", [*steps(), "files"])
def test_every_step_has_its_twin_and_its_proof(name: str) -> None:
    assert (ROOT / f"hf_bridge/{name}.py").is_file()
    assert (ROOT / f"tests/test_{name}.py").is_file()


def public(module: object) -> dict[str, object]:
    """The functions and classes that a module itself defines for others."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__  # type: ignore[attr-defined]
    }


def shape(function: object) -> list[tuple[str, object, object]]:
    """Names, kinds and defaults of the parameters; annotations may differ."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(p.name, p.kind, p.default) for p in parameters]


@pytest.mark.parametrize("name", [*steps(), "files"])
def test_twins_have_the_same_names_and_signatures(name: str) -> None:
    ours = importlib.import_module(f"minigpt.{name}")
    theirs = importlib.import_module(f"hf_bridge.{name}")
    shared = public(ours).keys() & vars(theirs).keys()
    assert shared, "twins without a common name"
    for key in shared:
        a, b = getattr(ours, key), getattr(theirs, key)
        if inspect.isfunction(a) and inspect.isfunction(b):
            assert shape(a) == shape(b), key
        elif inspect.isclass(a) and inspect.isclass(b) and not issubclass(b, Exception):
            for method, function in inspect.getmembers(b, inspect.isfunction):
                own = getattr(a, method, None)
                if method in vars(b) and method in vars(a) and not method.startswith("_"):
                    assert shape(own) == shape(function), f"{key}.{method}"


def test_public_names_say_what_they_are() -> None:
    for package in FORBIDDEN:
        for path in sources(package):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                    assert ast.get_docstring(node), f"{path}: {node.name}"


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_readme_names_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in readme_commands() if line.startswith("make ")]
    assert {"chat", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def python_commands() -> list[list[str]]:
    lines = [re.sub(r"^\.venv/bin/", "", line) for line in readme_commands()]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m ")]


@pytest.mark.parametrize("command", python_commands(), ids=" ".join)
def test_readme_commands_are_understood(command: list[str]) -> None:
    module, *arguments = command
    parser = importlib.import_module(f"{module}.__main__").parser()
    parser.parse_args(arguments)  # exits, and so fails, on a flag that does not exist


RUNNABLE = ("chatbot -p", "minigpt generate", "minigpt tokenize", "hf_bridge generate")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [c for c in python_commands() if " ".join(c).startswith(RUNNABLE) and "gpt2" not in c],
    ids=" ".join,
)
def test_readme_commands_run(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip()
