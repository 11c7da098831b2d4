"""``python -m sglang_memserve.launch_server``: one SGLang instance with a MemPool.

Takes every SGLang flag and a few of its own. Whatever can be known to be wrong is refused before
the engine's slow imports, in one line and with exit status 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from types import FrameType

from .config import (
    DEFAULT_DRAM,
    DEFAULT_EVICTION,
    InstanceConfig,
    new_generation,
    parse_checksums,
    parse_dram,
    parse_eviction,
    parse_limits,
    parse_role,
    parse_url,
)
from .errors import ConfigError
from .plugin import flags
from .startup import StartUp
from .types import Checksums, InstanceId

_HUB_TIMEOUT_S = 5.0
_REMOTE_SCHEMES = ("s3://", "gs://", "az://", "redis://", "instance://", "remote://", "http")
EXIT_BAD_INPUT = 2
_NO_SGLANG = "SGLang is not installed: install sglang-memserve[engine]"


def add_memserve_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("MemServe")
    group.add_argument(
        "--role",
        default="both",
        metavar="{prefill,decode,both}",
        help="What the router may use this instance for; can be changed later. Default: both.",
    )
    group.add_argument(
        "--router-url",
        action="append",
        nargs="+",
        default=[],
        metavar="URL",
        help="Router to register with, such as http://host:port; may be given several times. "
        "The instance serves on its own while a router is not there.",
    )
    group.add_argument(
        "--mempool-dram",
        default=DEFAULT_DRAM,
        metavar="SIZE",
        help="Memory for KV pages outside the device, divided among the instance's ranks. "
        f"Default: {DEFAULT_DRAM}.",
    )
    group.add_argument(
        "--mempool-eviction",
        default=DEFAULT_EVICTION.value,
        metavar="{lru,2q}",
        help="Which page makes room when MemPool is full: the least recently used, or one that was "
        f"not used again since it came. Default: {DEFAULT_EVICTION.value}.",
    )
    group.add_argument(
        "--mempool-checksums",
        default=Checksums.OFF.value,
        metavar="{on,off}",
        help="Keep a checksum of each page, which instances compare after they fetched it. "
        "Default: off.",
    )
    group.add_argument(
        "--mempool-limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="One of the bounds in docs/transfer.md, such as max_leases=2048 or "
        "max_leased_bytes_per_peer=4GiB; may be given several times.",
    )
    group.add_argument(
        "--advertise-url",
        metavar="URL",
        help="URL at which routers and other instances reach this one. Default: http://HOST:PORT.",
    )
    group.add_argument(
        "--cpu-threads",
        type=int,
        metavar="N",
        help="Threads that compute, for each rank, on a machine without an accelerator. "
        "Default: all cores.",
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="How long running requests may go on after SIGTERM. Default: 30.",
    )
    group.add_argument(
        "--no-mempool",
        action="store_true",
        help="A stock SGLang instance with the same defaults, without MemPool and router.",
    )


def print_help() -> None:
    """Our own flags at once, SGLang's when it is imported, which takes many seconds."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_memserve.launch_server",
        usage="%(prog)s --model-path MODEL [MemServe's flags] [SGLang's flags]",
        description="One SGLang instance with a MemPool.",
        add_help=False,
    )
    add_memserve_flags(parser)
    parser.print_help()
    sys.stdout.flush()
    if importlib.util.find_spec("sglang") is None:
        print(f"\n{_NO_SGLANG}", flush=True)
        return
    with StartUp("importing SGLang for its flags"):
        from .plugin import boot

        text = boot.engine_help()
    print(f"\n{text}", end="")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and everything else in its order for SGLang."""
    # No abbreviations: a prefix of one of ours may be a flag of SGLang's.
    parser = argparse.ArgumentParser(
        prog="python -m sglang_memserve.launch_server", add_help=False, allow_abbrev=False
    )
    add_memserve_flags(parser)
    own, rest = parser.parse_known_args(argv)
    own.router_url = [url for urls in own.router_url for url in urls]
    if own.cpu_threads is not None and own.cpu_threads < 1:
        raise ConfigError(f"--cpu-threads must be at least 1, got {own.cpu_threads}")
    if not 0 <= own.drain_timeout <= 3600:
        raise ConfigError(f"--drain-timeout must be within an hour, got {own.drain_timeout}")
    return own, rest


def require_model(model_path: str) -> None:
    """Raises ConfigError for a model that is neither a model folder nor known to the hub."""
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model folder {model_path} has no config.json")
        return
    if model_path.startswith(_REMOTE_SCHEMES):
        return
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise ConfigError(f"{model_path} is a file: expected a model folder or a .gguf file")
        return
    if model_path.startswith(("/", ".", "~")) or model_path.count("/") != 1:
        raise ConfigError(f"model folder {model_path} does not exist")
    if os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return
    _require_hub_model(model_path)


def _require_hub_model(model_id: str) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(model_id, "config.json"), str):
            return
        huggingface_hub.HfApi().model_info(model_id, timeout=_HUB_TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {model_id} is no folder here, not in the hub's cache, "
            f"and the hub does not give it: {reason}"
        ) from error


def require_free_port(host: str, port: int) -> None:
    """Raises ConfigError when ``host:port`` cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error


def reachable_host(host: str) -> str:
    """The host that others use: for a wildcard address, this machine's address on its network."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only picks the outgoing interface.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def build_config(
    own: argparse.Namespace, engine: flags.EngineFlags, runtime_dir: str
) -> InstanceConfig:
    peer_host = reachable_host(engine.host)
    bracketed = f"[{peer_host}]" if ":" in peer_host else peer_host
    url = own.advertise_url or f"http://{bracketed}:{engine.port}"
    return InstanceConfig(
        role=parse_role(own.role),
        url=InstanceId(parse_url(url)),
        generation=new_generation(),
        peer_host=peer_host,
        runtime_dir=runtime_dir,
        mempool_dram_bytes=flags.require_blocks(
            parse_dram(own.mempool_dram), own.mempool_dram, engine
        ),
        mempool_eviction=parse_eviction(own.mempool_eviction),
        router_urls=tuple(parse_url(router) for router in own.router_url),
        mempool_checksums=parse_checksums(own.mempool_checksums),
        limits=parse_limits(own.mempool_limit),
    )


def set_environment(own: argparse.Namespace, engine: flags.EngineFlags) -> None:
    """What libraries read once at import, so before they are imported. The operator's wins."""
    if Path(engine.model_path).expanduser().is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if own.cpu_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(own.cpu_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _exit_on_signal(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def run(argv: list[str]) -> int:
    """Serve until told to stop; returns the exit status. Raises ConfigError for bad input."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return 0
    if importlib.util.find_spec("sglang") is None:
        raise ConfigError(_NO_SGLANG)
    own, rest = parse(argv)
    parse_role(own.role)
    engine = flags.read_engine_flags(rest)
    if not own.no_mempool:
        flags.refuse_incompatible(rest)
    require_model(engine.model_path)
    # Before there is anything to clean up; SGLang takes the signal over once it serves.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    runtime_dir = tempfile.mkdtemp(prefix="memserve-")
    try:
        config = build_config(own, engine, runtime_dir)
        require_free_port(engine.host, engine.port)
        set_environment(own, engine)
        with StartUp("importing SGLang") as startup:
            from .plugin import boot

            startup.stage("starting the engine")
            return boot.serve(
                None if own.no_mempool else config,
                engine,
                rest,
                drain_s=own.drain_timeout,
                on_ready=startup.ready,
            )
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)


def main() -> int:
    try:
        return run(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
