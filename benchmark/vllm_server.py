"""vLLM's CPU build as a server: what every measurement of it starts with, so that they compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_CONTEXT_TOKENS = 8192


def arguments(python: Path | str, model: Path, slots: int = _CONTEXT_TOKENS) -> tuple[str, ...]:
    """Its command line in the environment of ``python``, without a port. It refuses to begin with
    a context longer than its KV ``slots``."""
    context = str(min(_CONTEXT_TOKENS, slots))
    return (
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", context),
    )


def environment(cores: Sequence[int]) -> dict[str, str]:
    """What it reads besides; one thread on each of ``cores``."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        # GiB; what is used of it may be said with the number of blocks.
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
    }
