"""Chaos over real processes: instances and a router are killed, frozen and started again at random,
under mixed load.

One instance at a time is away, so there is always somebody to serve: every request must end with
the answer that a calm cluster gave. Only a request whose own router was away may fail. In the end
no lease and no page being filled is left, and both routers' trees are what the instances hold.

``make chaos`` runs it: several minutes a seed, most of it SGLang starting again.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from integration.harness import (
    REQUEST_LIMIT_S,
    START_LIMIT_S,
    await_agreement,
    module_command,
    process_environment,
    stats_of,
    wait_until,
)
from sglang_memserve.cluster import probe
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.cluster.process import Command, GuardedProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif("MEMSERVE_CHAOS" not in os.environ, reason="run by make chaos"),
    pytest.mark.timeout(1800),
]

# A seed here is worth many of the simulated ones, and takes the time of as many.
SEEDS = range(math.ceil(int(os.environ.get("MEMSERVE_CHAOS", "1")) / 40))
ROLES = ("prefill", "decode", "both")
FAULTS = 8
CLIENTS = 4
SETTLE_S = 60.0
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
BEGINNINGS = [f"{n} is where this story begins, as so many did before it. " * 6 for n in range(3)]


@dataclass
class Process:
    """A server at one address that can be killed, frozen and started again."""

    command: Command
    url: str
    running: GuardedProcess | None = None

    def start(self) -> None:
        self.end()
        self.running = GuardedProcess(self.command)

    def end(self) -> None:
        if self.running is not None:
            self.running.release()
            self.running = None

    def send(self, number: signal.Signals) -> None:
        """To all its processes, schedulers first."""
        assert self.running is not None
        server = psutil.Process(self.running.pid)
        for process in [*server.children(recursive=True), server]:
            process.send_signal(number)

    def has_ended(self) -> bool:
        assert self.running is not None
        return self.running.poll() is not None

    def is_up(self) -> bool:
        assert self.running is not None
        assert not self.has_ended(), f"{self.command.name} died:\n{self.running.log_tail(40)}"
        return probe.instance_stage(self.url) is probe.Stage.UP


@dataclass
class World:
    instances: list[Process]
    routers: list[Process]
    over: threading.Event = field(default_factory=threading.Event)
    # When the first router was away; the last span may still be open.
    away: list[list[float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    answered: int = 0
    excused: int = 0
    done: list[str] = field(default_factory=list)

    def await_instances(self) -> None:
        for one in self.instances:
            wait_until(one.is_up, START_LIMIT_S, f"{one.command.name} is up")

    def await_members(self, router: Process, count: int) -> None:
        wait_until(
            lambda: probe.router_answers(router.url) and ready_sources(router.url) >= count,
            SETTLE_S,
            f"{router.command.name} knows {count} instances",
        )

    def was_away(self, since: float) -> bool:
        return any(end >= since for _, end in self.away)

    # -- what goes wrong --

    def fault(self, source: random.Random) -> None:
        victim = source.choice(self.instances)
        what = source.choice(["kill", "freeze", "leave", "router"])
        self.done.append(f"{what} {victim.command.name}" if what != "router" else what)
        if what == "freeze":
            victim.send(signal.SIGSTOP)
            time.sleep(source.uniform(1, 8))
            victim.send(signal.SIGCONT)
        elif what == "router":
            self.restart_router()
        else:
            assert victim.running is not None
            if what == "kill":
                victim.send(signal.SIGKILL)
            else:
                victim.running.terminate()
                wait_until(victim.has_ended, SETTLE_S, "it leaves")
            time.sleep(source.uniform(0, 2))
            victim.start()
            self.await_instances()
        for router in self.routers:
            self.await_members(router, len(self.instances))

    def restart_router(self) -> None:
        self.away.append([time.monotonic(), math.inf])
        self.routers[0].send(signal.SIGKILL)
        self.routers[0].start()
        self.await_members(self.routers[0], len(self.instances))
        self.away[-1][1] = time.monotonic()

    # -- what must be right all the same --

    def client(self, number: int, asked: list[tuple[str, dict[str, Any], Any]]) -> None:
        source = random.Random(f"client {number}")
        first = number % 2 == 0
        url = self.routers[number % 2].url
        while not self.over.is_set() and not self.wrong:
            path, body, expected = source.choice(asked)
            since = time.monotonic()
            try:
                got = said(url, path, {**body, "stream": source.random() < 0.6})
                problem = "" if got == expected else f"{got} instead of {expected}"
            except (requests.RequestException, Refused) as error:
                problem = f"{type(error).__name__}: {error}"
            if not problem:
                self.answered += 1
            elif first and self.was_away(since):
                self.excused += 1
                time.sleep(0.2)
            else:
                seconds = time.monotonic() - since
                self.wrong.append(f"{self.done}: {path} {body} after {seconds:.1f} s: {problem}")


class Refused(Exception):
    pass


def ready_sources(router: str) -> int:
    """Instances that are ready, their events exact."""
    members = requests.get(f"{router}/readiness", timeout=10).json()["members"]
    return sum(one["state"] == "ready" and one["source"] == "exact" for one in members)


def requests_of(source: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    for number in range(24):
        path = PATHS[number % 3]
        prompt = source.choice(BEGINNINGS) + f"The {number}th day brought"
        limit = source.randrange(4, 60)
        if path == "/generate":
            sampling = {"temperature": 0, "max_new_tokens": limit, "ignore_eos": True}
            yield path, {"text": prompt, "sampling_params": sampling}
            continue
        body = {"model": "default", "temperature": 0, "max_tokens": limit, "ignore_eos": True}
        if path == "/v1/completions":
            yield path, {**body, "prompt": prompt}
        else:
            yield path, {**body, "messages": [{"role": "user", "content": prompt}]}


def said(url: str, path: str, body: dict[str, Any]) -> Any:
    """Text and why it ended, however it was sent. Raises Refused, requests' errors."""
    with requests.post(
        f"{url}{path}", json=body, stream=body["stream"], timeout=REQUEST_LIMIT_S
    ) as response:
        if response.status_code != 200:
            raise Refused(f"{response.status_code}: {response.text}")
        if not body["stream"]:
            return read([response.json()])
        lines = [line for line in response.iter_lines() if line]
    if lines[-1:] != [b"data: [DONE]"]:
        raise Refused(f"no [DONE] after {lines[-1:]!r}")
    return read([json.loads(line.removeprefix(b"data:")) for line in lines[:-1]])


def read(frames: list[Any]) -> Any:
    for frame in frames:
        if "error" in frame:
            raise Refused(str(frame["error"]))
    if "choices" not in frames[-1]:
        last = frames[-1]
        return last["text"], last["output_ids"], last["meta_info"]["finish_reason"]["type"]
    text, reason = "", None
    for frame in frames:
        for choice in frame["choices"]:
            part = choice.get("delta") or choice.get("message") or choice
            text += part.get("content", part.get("text")) or ""
            reason = choice["finish_reason"] or reason
    return text, reason


@contextmanager
def world_of(model: Path, folder: Path) -> Iterator[World]:
    with process_environment() as environment, ExitStack() as stack:
        ports = free_ports(5, taken=set())
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        quick = ("--heartbeat-s", "1", "--expire-s", "4")
        routers = [
            Process(
                Command(
                    f"router-{n}",
                    module_command("router", "--port", str(ports[n]), *quick),
                    environment,
                    folder / f"router-{n}.log",
                ),
                urls[n],
            )
            for n in range(2)
        ]
        instances = []
        for role, port, url in zip(ROLES, ports[2:], urls[2:], strict=True):
            argv = module_command(
                "launch_server",
                *("--model-path", str(model), "--role", role, "--port", str(port)),
                *("--mempool-dram", "64MiB"),
                # Stock SGLang, too, answers otherwise when it decodes several requests at once: a
                # random model's best tokens are close, and sums round by the batch.
                *("--max-running-requests", "1"),
                *("--router-url", urls[0], "--router-url", urls[1]),
            )
            command = Command(role, argv, environment, folder / f"{role}.log")
            instances.append(Process(command, url))
        world = World(instances, routers)
        for one in [*routers, *instances]:
            stack.callback(one.end)
            one.start()
        world.await_instances()
        for router in routers:
            world.await_members(router, len(instances))
        yield world


@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_is_answered(
    seed: int, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = random.Random(f"chaos {seed}")
    with world_of(tiny_model, tmp_path_factory.mktemp("chaos")) as world:
        calm = world.routers[1].url
        asked = [
            (path, body, said(calm, path, {**body, "stream": False}))
            for path, body in requests_of(source)
        ]
        clients = [
            threading.Thread(target=world.client, args=(number, asked)) for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            for _ in range(FAULTS):
                time.sleep(source.uniform(1, 4))
                if not world.wrong:
                    world.fault(source)
        finally:
            world.over.set()
            for client in clients:
                client.join(REQUEST_LIMIT_S)
        assert not world.wrong, f"seed {seed}: {world.wrong}"
        assert not any(client.is_alive() for client in clients)
        assert world.answered > 50, (world.answered, world.excused)
        for one in world.instances:
            await_quiet(one.url)
        for router in world.routers:
            await_agreement(router.url, [one.url for one in world.instances], SETTLE_S)
        print(f"seed {seed}: {world.answered} answered, {world.excused} excused, {world.done}")


def await_quiet(url: str) -> None:
    wait_until(
        lambda: not any(stats_of(url)[name] for name in ("leases", "filling_blocks")),
        SETTLE_S,
        f"{url} has no lease and fills no page",
    )
