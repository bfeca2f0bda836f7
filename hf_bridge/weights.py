"""Step 7 through transformers: from_pretrained, and what it must be asked so as not to guess.

Left alone, it initialises a missing weight at random with a printed table, takes pickled files
where there are no others, asks on the terminal whether to run a model's code, and casts to the
dtype that config.json names, whole numbers too. Of old files' buffers it knows `attn.bias`, not
`masked_bias`.

Before: model.py.  After: sampler.py.  Twin: minigpt/weights.py.  Proof: tests/test_weights.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GPT2LMHeadModel
from transformers.generation import GenerationConfig
from transformers.utils import logging

from hf_bridge import config as config_step
from hf_bridge.files import WeightsError, read_json, resolve, weight_files, writing
from hf_bridge.model import GPT


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """A model ready for inference; WeightsError for files that are missing, damaged or foreign."""
    folder = resolve(name_or_path)
    config_step.read(folder)
    if "quantization_config" in read_json(folder / "config.json"):
        from hf_bridge import quant  # step 10 reads codes in place of weights

        return quant.load(folder, dtype=dtype, device=device)
    return read(folder, dtype=dtype).to(device)


def read(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, str] | None = None,
) -> GPT:
    """A float model from its directory, in eval mode; a device_map as in placement.py."""
    config = config_step.read(folder)
    files = weight_files(folder)
    try:
        whole = [name for path in files for name in _whole_numbers(path)]
        with quiet():
            hf, report = GPT2LMHeadModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                device_map=device_map,
                ignore_mismatched_sizes=True,  # not ignored: reported, with the others, below
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise WeightsError(diagnose(files, error)) from error
    check_report(folder, report, whole)
    with torch.device("meta"):
        model = GPT(config)
    model.hf = hf
    model._slide(None, 0)
    return model.eval()


def save(model: GPT, folder: str | Path) -> None:
    """Write config.json, model.safetensors and generation_config.json, each at one stroke.

    Raises ValueError for a model with wrapped layers: the library would save what wraps them.
    """
    with torch.device("meta"):
        plain = GPT(model.config).state_dict()
    foreign = [name for name in model.state_dict() if name not in plain]
    if foreign:
        raise ValueError(
            f"only a plain GPT can be saved, this one holds {foreign[0]}: merge or take off what "
            "wraps its layers, or save that by its own step: quant.save, lora.save, adapters.save"
        )
    model.hf.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        with quiet(), writing(Path(folder)) as part:
            model.hf.save_pretrained(part)
    finally:
        model.hf.generation_config = GenerationConfig()


def check_report(folder: Path, report: dict, whole_numbers: Sequence[str] = ()) -> None:
    """Raise WeightsError, naming up to three tensors, if anything was left over or out."""
    unknown = [n for n in report["unexpected_keys"] if not n.endswith(".attn.masked_bias")]
    shapes = [
        f"{_ours(name)} is {tuple(found)}, config.json says {tuple(expected)}"
        for name, found, expected in report["mismatched_keys"]
    ]
    for what, names in (
        ("tensors missing", report["missing_keys"] - {n for n, *_ in report["mismatched_keys"]}),
        ("tensors unknown to GPT-2", unknown),
        ("tensors of another shape", shapes),
        ("tensors that are no floats", whole_numbers),
    ):
        if names:
            shown = sorted(map(_ours, names))
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            raise WeightsError(f"{folder} has {what}: {', '.join(shown[:3])}{more}")


def _whole_numbers(path: Path) -> list[str]:
    """The names of a file's integer tensors, the old files' masks aside."""
    with safe_open(path, framework="pt") as file:
        names = [n for n in file.keys() if not n.endswith((".attn.bias", ".attn.masked_bias"))]  # noqa: SIM118
        return [name for name in names if "F" not in file.get_slice(name).get_dtype()]


def _ours(name: str) -> str:
    return name.removeprefix("transformer.")


def diagnose(files: list[Path], error: Exception) -> str:
    """Which file it was, and what it is instead; transformers names none."""
    for path in files:
        head = path.open("rb").read(64)
        if head.startswith(b"version https://git-lfs"):
            return f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` there"
        if head.lstrip()[:1] == b"<":
            return f"{path} is a web page, not the weights: download it again"
    return f"{files[-1]} is not a whole safetensors file ({error}): download it again"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, no printed table; the settings are put back afterwards."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
