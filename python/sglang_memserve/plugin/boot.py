"""Starts SGLang's server in this process, with MemServe mounted on it.

Order: flags -> routes mounted on SGLang's app -> SGLang starts its processes -> warm-up ->
``Mounted.ready`` -> serving -> SIGTERM -> ``Mounted.terminating`` -> drain -> exit.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.tokenizer_manager import ServerStatus, SignalHandler, TokenizerManager
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs, prepare_server_args
from sglang.srt.utils import kill_process_tree

from ..config import InstanceConfig
from ..errors import ConfigError
from . import PLATFORM_NAME, activate_platform, flags, validation
from .warmup import Outcome, warm_up

logger = logging.getLogger(__name__)

# After the drain SGLang looks again within 5 s and gives its schedulers 15 s to leave.
_SHUTDOWN_MARGIN_S = 25.0
_FORCE_SHUTDOWN = "SGL_FORCE_SHUTDOWN"


class Mounted(Protocol):
    """What ``plugin.routes.mount`` may return. Both are called at most once, on other threads."""

    def ready(self) -> None:
        """The server answers requests."""

    def terminating(self) -> None:
        """SIGTERM arrived; running requests are being finished. Must not block for long."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def engine_help() -> str:
    """SGLang's flags, as argparse shows them."""
    load_plugins()
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    ServerArgs.add_cli_args(parser)
    return parser.format_help()


def cpu_platform_is_active(device: str | None) -> bool:
    """Whether SGLang will run on our CPU platform."""
    chosen = os.environ.get("SGLANG_PLATFORM", "")
    return (
        device in (None, "cpu")
        and chosen in ("", PLATFORM_NAME)
        and activate_platform() is not None
    )


def serve(
    config: InstanceConfig | None,
    engine: flags.EngineFlags,
    argv: list[str],
    *,
    drain_s: float,
    on_ready: Callable[[], None],
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    The caller has turned SIGTERM into SystemExit, so that a signal in start-up ends the children
    that SGLang has started by then. ``config`` None means no MemPool. ``argv`` is the operator's,
    for SGLang. ``on_ready`` is called on another thread. Raises ConfigError for flags that SGLang
    refuses.
    """
    load_plugins()
    try:
        server_args = build_server_args(config, engine, argv)
        mounted = _mount(config, server_args)
        if config is not None:
            validation.register()

        def ready() -> None:
            on_ready()
            if mounted is not None:
                mounted.ready()

        http_server.launch_server(
            server_args,
            init_tokenizer_manager_func=_with_bounded_drain(mounted, drain_s),
            execute_warmup_func=_warm_up,
            launch_callback=ready,
        )
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kill_process_tree(os.getpid(), include_parent=False, wait_timeout=10)


def build_server_args(
    config: InstanceConfig | None, engine: flags.EngineFlags, argv: list[str]
) -> ServerArgs:
    """Defaults first, then what the operator said, so that the operator wins."""
    parser = _Parser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    if any(word.split("=", 1)[0] == "--config" for word in argv):
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

        argv = ConfigArgumentMerger(parser).merge_config_with_args(argv)
    ours = flags.common_defaults()
    if cpu_platform_is_active(engine.device):
        ours += flags.cpu_defaults(engine.model_path)
        bind_cores(engine.tp_size)
    if config is not None:
        # Again, because a --config file may have added some.
        flags.refuse_incompatible(argv)
        ours += flags.linker_flags(config)
    # Parsed once more than needed: SGLang's own parser answers a mistake with pages of usage.
    parser.parse_args(ours + argv)
    server_args: ServerArgs = prepare_server_args(ours + argv)
    try:
        server_args.resolve_once()
    except (ValueError, AssertionError, OSError, NotImplementedError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"SGLang refuses these settings: {text}") from error
    return server_args


def bind_cores(ranks: int) -> None:
    """Without this SGLang wants a NUMA node for each rank. The operator's choice wins."""
    if ranks <= 1 or "SGLANG_CPU_OMP_THREADS_BIND" in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [cores[rank * share % len(cores) :][:share] for rank in range(ranks)]
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
        ",".join(str(core) for core in group) for group in groups
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


def _mount(config: InstanceConfig | None, server_args: ServerArgs) -> Mounted | None:
    if config is None or importlib.util.find_spec("sglang_memserve.plugin.routes") is None:
        return None
    routes = importlib.import_module("sglang_memserve.plugin.routes")
    mounted: Mounted | None = routes.mount(http_server.app, config, server_args)
    return mounted


def _warm_up(server_args: ServerArgs) -> bool:
    outcome = warm_up(server_args)
    if outcome is Outcome.NOT_TEXT:
        healthy: bool = http_server._execute_server_warmup(server_args)
        return healthy
    if outcome is Outcome.FAILED:
        kill_process_tree(os.getpid())
        return False
    state = http_server.get_global_state()
    state.tokenizer_manager.server_status = ServerStatus.Up
    return True


def _with_bounded_drain(
    mounted: Mounted | None, drain_s: float
) -> Callable[[ServerArgs, PortArgs], tuple[TokenizerManager, TemplateManager]]:
    """SGLang's tokenizer manager, whose SIGTERM handler also tells us and has a deadline."""

    class Handler(SignalHandler):
        def sigterm_handler(self, signum: int | None = None, frame: object = None) -> None:
            already = self.tokenizer_manager.gracefully_exit
            super().sigterm_handler(signum, frame)
            if not already:
                threading.Thread(
                    target=_end_within, args=(mounted, drain_s), name="memserve-exit", daemon=True
                ).start()

    def init(
        server_args: ServerArgs, port_args: PortArgs
    ) -> tuple[TokenizerManager, TemplateManager]:
        tokenizer_manager, template_manager = init_tokenizer_manager(server_args, port_args)
        tokenizer_manager.signal_handler_class = Handler
        return tokenizer_manager, template_manager

    return init


def _end_within(mounted: Mounted | None, drain_s: float) -> None:
    started = time.monotonic()
    if mounted is not None:
        mounted.terminating()
    time.sleep(max(0.0, started + drain_s - time.monotonic()))
    os.environ[_FORCE_SHUTDOWN] = "1"
    time.sleep(_SHUTDOWN_MARGIN_S)
    logger.error("still running %.0f s after SIGTERM: leaving now", time.monotonic() - started)
    kill_process_tree(os.getpid(), include_parent=False, wait_timeout=None)
    sys.stderr.flush()
    os._exit(1)
