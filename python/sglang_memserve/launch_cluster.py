"""``python -m sglang_memserve.launch_cluster``: a router and instances on this machine.

Standard output gets exactly one line, ``ready http://HOST:PORT``, when requests will be served;
everything else goes to standard error and to one log a process. Ctrl-C or SIGTERM ends it all
within about ten seconds, a second one at once; nothing is left behind even if this process is
killed (see ``cluster.guard``).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from .cluster.machine import free_ports, this_machine
from .cluster.plan import Options, flag_value, make_plan
from .cluster.supervisor import Cluster, StartFailed, StopAsked, write_json
from .cluster.table import Progress
from .errors import ConfigError, MemServeError
from .launch_server import require_free_port, require_model

EXIT_BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    # No abbreviations: a prefix of one of ours may be a flag of SGLang's.
    parser = argparse.ArgumentParser(
        prog="python -m sglang_memserve.launch_cluster",
        description="A router and SGLang instances with MemPools on this machine.",
        epilog="Every other flag goes to each instance: see launch_server --help. Memory and "
        "cores are divided between the instances unless flags say otherwise.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", "--model", required=True, help="model folder or hub id")
    add("--prefill", type=int, help="instances that prefill (default 1, or 0 with --both)")
    add("--decode", type=int, help="instances that decode (default 1, or 0 with --both)")
    add("--both", type=int, default=0, help="instances that do both (default 0)")
    add("--host", default="127.0.0.1", help="where the router listens (default %(default)s)")
    add("--port", type=int, default=30000, help="the router's port (default %(default)s)")
    add("--policy", help="the router's policy: see python -m sglang_memserve.router --help")
    add(
        "--router-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="one more argument for the router, as --router-arg=--flag; may be repeated",
    )
    add("--log-dir", type=Path, help="folder for the logs (default: a new temporary one)")
    add(
        "--json-ready",
        type=Path,
        metavar="FILE",
        help="when ready, write process ids, URLs and logs there as JSON",
    )
    add(
        "--startup-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="give up when not ready by then (default %(default)g)",
    )
    return parser


def parse(argv: list[str]) -> Options:
    """Raises ConfigError for a cluster that could not serve; exits like argparse otherwise."""
    own, rest = build_parser().parse_known_args(argv)
    unless_both = 0 if own.both else 1
    router_args = list(own.router_arg)
    if own.policy is not None:
        router_args += ["--policy", own.policy]
    api_key = flag_value(rest, ("--api-key",))
    if api_key:
        router_args += ["--api-key", api_key]
    admin_key = flag_value(rest, ("--admin-api-key",))
    if admin_key:
        router_args += ["--admin-key", admin_key]
    return Options(
        model_path=own.model_path,
        prefill=unless_both if own.prefill is None else own.prefill,
        decode=unless_both if own.decode is None else own.decode,
        both=own.both,
        host=own.host,
        port=own.port,
        startup_timeout_s=own.startup_timeout,
        log_dir=own.log_dir,
        json_ready=own.json_ready,
        router_args=tuple(router_args),
        instance_args=tuple(rest),
    )


class _StopFlag:
    """Set by SIGINT and SIGTERM. The second one ends this process, and its guards the rest."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


def run(options: Options) -> int:
    """Serve until told to stop; returns the exit status. Raises MemServeError."""
    require_model(options.model_path)
    require_free_port(options.host, options.port)
    stop_asked = _StopFlag()
    log_dir = options.log_dir or Path(tempfile.mkdtemp(prefix="memserve-cluster-"))
    log_dir.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    progress.say(f"logs: {log_dir}")
    ports = free_ports(len(options.roles), taken={options.port})
    plan = make_plan(options, this_machine(), ports, os.environ, log_dir)
    api_key = flag_value(options.instance_args, ("--api-key",))
    with Cluster(plan, progress, stop_asked, api_key) as cluster:
        with progress:
            cluster.start(options.startup_timeout_s)
        if options.json_ready is not None:
            write_json(options.json_ready, cluster.describe())
        print(f"ready {options.url}", flush=True)
        status = cluster.supervise()
        progress.say("stopping")
        return status


def main() -> int:
    try:
        return run(parse(sys.argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except StopAsked as stopped:
        print(stopped, file=sys.stderr)
        return 128 + signal.SIGTERM
    except StartFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except MemServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
