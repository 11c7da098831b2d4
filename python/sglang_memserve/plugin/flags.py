"""SGLang flags: what we read of them, what we refuse, and what we add. Imports no SGLang.

The operator's flags go to SGLang untouched and always come after ours, so that theirs win.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from ..config import InstanceConfig
from ..errors import ConfigError

LINKER_MODULE = "sglang_memserve.plugin.linker"
LINKER_CLASS = "MemPoolLinker"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 30000

_POOL_BYTES = 2**30
_MIN_POOL_TOKENS = 4096
_MAX_POOL_TOKENS = 65536
_UNKNOWN_MODEL_POOL_TOKENS = 16384

_REFUSED_FLAGS = {
    "--enable-hierarchical-cache": "MemPool takes its place, and SGLang allows only one of them",
    "--enable-lmcache": "MemPool takes its place",
    "--enable-flexkv": "MemPool takes its place",
    "--radix-cache-backend": "MemPool needs SGLang's own radix cache",
    "--disable-radix-cache": "MemPool extends the radix cache and cannot work without it",
    "--enable-unified-cache-external-linker": "MemPool is the external linker here",
    "--unified-cache-external-linker-backend": "MemPool is the external linker here",
    "--unified-cache-external-linker-config": "MemPool is the external linker here",
    "--use-ray": "MemServe serves through SGLang's HTTP process on this machine",
    "--smg-grpc-mode": "MemServe serves through SGLang's HTTP process",
    "--grpc-mode": "MemServe serves through SGLang's HTTP process",
}
_ONLY_ONE = {
    "tokenizer_worker_num": "/memserve/* is served by a single HTTP process",
    "dp_size": "start one instance for each replica; the router balances them",
    "pp_size": "pages of a pipeline stage are not whole prefixes",
    "nnodes": "an instance's ranks must be on one machine",
}


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """The few SGLang settings that MemServe acts on before the engine starts."""

    model_path: str
    host: str
    port: int
    device: str | None
    tp_size: int
    page_size: int = 16

    @property
    def url_host(self) -> str:
        """``host`` as others on this machine reach it."""
        if self.host in ("0.0.0.0", ""):
            return "127.0.0.1"
        return "::1" if self.host == "::" else self.host


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read_engine_flags(argv: list[str]) -> EngineFlags:
    """Raises ConfigError without a model path or with a malformed number."""
    known = _read_known(argv)
    if not known.model_path:
        raise ConfigError("--model-path is required: a model folder or a hub id")
    if not 0 < known.port < 65536:
        raise ConfigError(f"--port {known.port} is not a port")
    return EngineFlags(
        known.model_path, known.host, known.port, known.device, known.tp_size, known.page_size
    )


def _read_known(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model", default="")
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--device")
    parser.add_argument("--tensor-parallel-size", "--tp-size", "--tp", dest="tp_size", type=int)
    parser.add_argument("--data-parallel-size", "--dp-size", "--dp", dest="dp_size", type=int)
    parser.add_argument("--pipeline-parallel-size", "--pp-size", dest="pp_size", type=int)
    parser.add_argument("--nnodes", type=int)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--tokenizer-worker-num", type=int)
    parser.add_argument("--disaggregation-mode", default="null")
    parser.set_defaults(tp_size=1, dp_size=1, pp_size=1, nnodes=1, tokenizer_worker_num=1)
    return parser.parse_known_args(argv)[0]


def refuse_incompatible(argv: list[str]) -> None:
    """Raises ConfigError naming the first flag that cannot go with MemPool, and why."""
    for word in argv:
        name = word.split("=", 1)[0]
        if name in _REFUSED_FLAGS:
            raise ConfigError(f"{name} cannot be used: {_REFUSED_FLAGS[name]}")
    known = _read_known(argv)
    if known.disaggregation_mode != "null":
        raise ConfigError(
            "--disaggregation-mode cannot be used: a MemServe instance is a whole engine; "
            "say --role prefill or --role decode"
        )
    for name, reason in _ONLY_ONE.items():
        if getattr(known, name) > 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {getattr(known, name)} cannot be used: {reason}")


def linker_flags(config: InstanceConfig) -> list[str]:
    """What makes SGLang build our linker in each scheduler process."""
    linker = {
        "linker": LINKER_CLASS,
        "linker_module_path": LINKER_MODULE,
        "linker_extra_config": config.to_json(),
    }
    return [
        "--enable-unified-cache-external-linker",
        "--unified-cache-external-linker-backend",
        "dynamic",
        "--unified-cache-external-linker-config",
        json.dumps(linker),
    ]


def common_defaults() -> list[str]:
    """Defaults on every machine."""
    return ["--host", DEFAULT_HOST, "--enable-cache-report"]


def cpu_defaults(model_path: str) -> list[str]:
    """Defaults that suit a machine without an accelerator."""
    return [
        "--device",
        "cpu",
        "--page-size",
        "16",
        "--sleep-on-idle",
        "--disable-overlap-schedule",
        "--cuda-graph-backend-decode",
        "disabled",
        "--cuda-graph-backend-prefill",
        "disabled",
        "--chunked-prefill-size",
        "512",
        # Bounds the pool only, and refuses to start when others take memory meanwhile;
        # --max-total-tokens decides.
        "--mem-fraction-static",
        "0.9",
        "--max-total-tokens",
        str(suitable_pool_tokens(model_path)),
    ]


def suitable_pool_tokens(model_path: str) -> int:
    """Device-pool slots worth at most 1 GiB or a tenth of this machine's memory."""
    budget = min(_POOL_BYTES, psutil.virtual_memory().total // 10)
    per_token = _kv_bytes_per_token(Path(model_path).expanduser() / "config.json")
    if per_token is None:
        return _UNKNOWN_MODEL_POOL_TOKENS
    tokens: int = max(_MIN_POOL_TOKENS, min(_MAX_POOL_TOKENS, budget // per_token))
    return tokens // 16 * 16


def require_blocks(dram_bytes: int, said: str, engine: EngineFlags) -> int:
    """``dram_bytes``. Raises ConfigError when not one page fits, where the model's config tells:
    the pool itself would notice only when the model is loaded."""
    per_token = _kv_bytes_per_token(Path(engine.model_path).expanduser() / "config.json")
    page_bytes = (per_token or 0) * engine.page_size // max(1, engine.tp_size)
    share = dram_bytes // max(1, engine.tp_size)
    if share < page_bytes:
        raise ConfigError(
            f"--mempool-dram {said} holds no page: each of {engine.tp_size} ranks gets {share} "
            f"bytes, one page of this model takes {page_bytes} bytes on each rank"
        )
    return dram_bytes


def _kv_bytes_per_token(config_file: Path) -> int | None:
    """Of a plain transformer; None when the config does not say (a default is then used)."""
    try:
        model = json.loads(config_file.read_text())
        heads = int(model["num_attention_heads"])
        kv_heads = int(model.get("num_key_value_heads") or heads)
        head_dim = int(model.get("head_dim") or model["hidden_size"] // heads)
        return int(model["num_hidden_layers"]) * 2 * kv_heads * head_dim * 2
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None
