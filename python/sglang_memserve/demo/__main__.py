"""``python -m sglang_memserve.demo``: 1 prefill, 1 decode and a router on a real model.

Runs a frontend program, a chat and the same again, shows for each request who did what, compares
the outputs with one stock SGLang instance, and exits with 0 only if every check passed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rich.console import Console

from ..cluster import probe
from ..cluster.machine import free_ports, this_machine
from ..cluster.plan import ClusterPlan, Options, make_plan
from ..cluster.process import Command, GuardedProcess
from ..cluster.supervisor import Cluster, write_json
from ..cluster.table import Progress
from ..demo_model import is_complete, make_demo_model
from ..errors import ConfigError, MemServeError
from ..launch_server import require_free_port, require_model
from . import checks, programs, report
from .observe import Observation, Recorder

DEFAULT_MODEL = Path(".cache/models/SmolLM2-135M-Instruct")
START_LIMIT_S = 300.0
_IMPORT_LIMIT_S = 180.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang_memserve.demo", description=__doc__)
    add = parser.add_argument
    add("--model-path", type=Path, default=DEFAULT_MODEL, help="model (default: %(default)s)")
    add("--port", type=int, default=0, help="the router's port (default: a free one)")
    add("--json", type=Path, metavar="FILE", help="write all that was seen there")
    add("--keep", action="store_true", help="leave the cluster up at the end, until Ctrl-C")
    add("--log-dir", type=Path, help="folder for the logs (default: a new temporary one)")
    return parser


def _stock_command(plan: ClusterPlan, log_dir: Path) -> tuple[str, Command]:
    """The same engine with the same defaults and threads, without MemServe."""
    taken = {int(instance.url.rpartition(":")[2]) for instance in plan.instances}
    (port,) = free_ports(1, taken)
    model = plan.instances[0].command.argv
    threads = model[model.index("--cpu-threads") :][:2] if "--cpu-threads" in model else ()
    argv = (
        *(sys.executable, "-m", "sglang_memserve.launch_server", "--no-mempool"),
        *("--model-path", model[model.index("--model-path") + 1]),
        *("--host", "127.0.0.1", "--port", str(port), *threads),
    )
    url = f"http://127.0.0.1:{port}"
    return url, Command("stock", argv, dict(os.environ), log_dir / "stock.log")


def _wait_for_stock(process: GuardedProcess, url: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while probe.instance_stage(url) is not probe.Stage.UP:
        if process.poll() is not None or time.monotonic() > deadline:
            raise MemServeError(
                f"the stock instance did not start; log: {process.command.log}\n"
                f"{process.log_tail(15)}"
            )
        time.sleep(0.3)


class Demo:
    """Phases against one cluster; ``outputs`` and observations add up."""

    def __init__(self, console: Console, router_url: str, names: dict[str, str]) -> None:
        self._console = console
        self._router_url = router_url
        self._names = names
        self.outputs: dict[str, dict[str, str]] = {}
        self.observations: list[Observation] = []

    def phase(self, name: str, program: Callable[[str], dict[str, str]]) -> None:
        with (
            report.PhaseTable(self._console, name) as table,
            Recorder(self._router_url, self._names, table.add) as recorder,
        ):
            recorder.phase = name
            self.outputs[name] = program(recorder.url)
        self.observations += recorder.observations


def _cluster_options(arguments: argparse.Namespace) -> Options:
    return Options(
        model_path=str(arguments.model_path),
        prefill=1,
        decode=1,
        both=0,
        host="127.0.0.1",
        port=arguments.port or free_ports(1, taken=set())[0],
        startup_timeout_s=START_LIMIT_S,
        # Prompts of some hundred tokens on a small model may be cheaper to compute than to move;
        # the demo is about moving.
        router_args=("--bypass-tokens", "0"),
    )


def run(arguments: argparse.Namespace) -> int:
    """Raises MemServeError. Returns 0 when every check passed, else 1."""
    began = time.monotonic()
    # The tables need room; a pipe or a log has it.
    console = Console(width=None if sys.stdout.isatty() else 150)
    if arguments.model_path == DEFAULT_MODEL and not is_complete(DEFAULT_MODEL):
        make_demo_model(DEFAULT_MODEL, console.print)
    options = _cluster_options(arguments)
    require_model(options.model_path)
    require_free_port(options.host, options.port)
    log_dir = arguments.log_dir or Path(tempfile.mkdtemp(prefix="memserve-demo-"))
    log_dir.mkdir(parents=True, exist_ok=True)
    ports = free_ports(len(options.roles), taken={options.port})
    plan = make_plan(options, this_machine(), ports, os.environ, log_dir)
    progress = Progress()
    progress.say(f"logs: {log_dir}")
    # Starting is mostly importing, so everything that has to be imported is at the same time.
    clients = threading.Thread(target=programs.import_clients, daemon=True)
    clients.start()
    stock_url, stock_command = _stock_command(plan, log_dir)
    with GuardedProcess(stock_command) as stock, Cluster(plan, progress, lambda: False) as cluster:
        with progress:
            cluster.start(START_LIMIT_S)
        clients.join(_IMPORT_LIMIT_S)
        names = {instance.url: instance.command.name for instance in plan.instances}
        demo = Demo(console, options.url, names)
        demo.phase(checks.PROGRAM, programs.run_program)
        demo.phase(checks.CHAT, programs.run_chat)
        demo.phase(checks.PROGRAM_AGAIN, programs.run_program)
        demo.phase(checks.CHAT_AGAIN, programs.run_chat)
        _wait_for_stock(stock, stock_url)
        expected = {
            checks.PROGRAM: programs.run_program(stock_url),
            checks.CHAT: programs.run_chat(stock_url),
        }
        stock.release()
        results = checks.run_checks(
            demo.observations,
            demo.outputs,
            expected,
            decoders=[i.command.name for i in plan.instances if i.role.can_decode],
            page_size=_page_size(plan.instances[0].url),
            expected_requests=2 * programs.REQUESTS,
        )
        report.show_checks(console, results)
        seconds = time.monotonic() - began
        if arguments.json is not None:
            facts = {"seconds": seconds, "model": options.model_path, "stock_outputs": expected}
            value = report.as_json(demo.observations, results, demo.outputs, facts)
            write_json(arguments.json, value)
        passed = all(result.passed for result in results)
        _summary(console, demo.observations, passed, seconds)
        if arguments.keep:
            console.print(f"the cluster stays up at {options.url} until Ctrl-C")
            cluster.supervise()
    return 0 if passed else 1


def _page_size(url: str) -> int:
    import msgspec

    from ..protocol.http import InstanceInfo

    status, body = probe.get(f"{url}/memserve/info")
    if status != 200:
        raise MemServeError(f"{url}/memserve/info answers {status}")
    return msgspec.json.decode(body, type=InstanceInfo).page_size


def _summary(
    console: Console, observations: list[Observation], passed: bool, seconds: float
) -> None:
    prompt = sum(o.prompt_tokens for o in observations)
    reused = sum(o.reused_tokens or 0 for o in observations)
    moved = sum(o.total_fetched_bytes for o in observations)
    console.print(
        f"{len(observations)} requests, {prompt} prompt tokens, {reused} of them reused "
        f"({100 * reused // max(1, prompt)} %), {moved / 1e6:.1f} MB moved over NIXL, "
        f"{seconds:.0f} s in all"
    )
    verdict = "[green]all checks passed[/]" if passed else "[bold red]some checks failed[/]"
    console.print(verdict)


def _stop(number: int, frame: FrameType | None) -> None:
    # Leaves through every context manager, so that all processes are ended.
    raise SystemExit(128 + number)


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    try:
        return run(build_parser().parse_args())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
