"""From the command line to command lines: what each process is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_memserve.cluster.machine import Machine
from sglang_memserve.cluster.plan import ClusterPlan, dram_bytes, flag_value, make_plan
from sglang_memserve.errors import ConfigError
from sglang_memserve.launch_cluster import parse
from sglang_memserve.types import Role

CPU = Machine(cores=8, available_bytes=16 * 2**30, accelerators=0)


def plan(arguments: str, machine: Machine = CPU) -> ClusterPlan:
    options = parse(["--model-path", "M", *arguments.split()])
    ports = range(40000, 40000 + len(options.roles))
    return make_plan(options, machine, ports, {"PATH": "/bin"}, Path("logs"))


def told(argv: tuple[str, ...], flag: str) -> str | None:
    return flag_value(argv, (flag,))


def test_by_default_one_of_each_under_one_router() -> None:
    made = plan("--port 31000")
    assert [instance.role for instance in made.instances] == [Role.PREFILL, Role.DECODE]
    assert made.router_url == "http://127.0.0.1:31000"
    assert told(made.router.argv, "--port") == "31000"
    for instance, port in zip(made.instances, ("40000", "40001"), strict=True):
        argv = instance.command.argv
        assert told(argv, "--router-url") == made.router_url
        assert told(argv, "--role") == instance.role.value
        assert told(argv, "--port") == port
        assert told(argv, "--host") == "127.0.0.1"
        assert instance.url.endswith(port)


def test_names_and_logs_are_apart() -> None:
    made = plan("--prefill 2 --decode 1 --both 1")
    commands = [made.router, *(instance.command for instance in made.instances)]
    assert [c.name for c in commands] == ["router", "prefill-0", "prefill-1", "decode-0", "both-0"]
    assert len({c.log for c in commands}) == len(commands)


def test_both_alone_asks_for_no_others() -> None:
    assert [i.role for i in plan("--both 2").instances] == [Role.BOTH, Role.BOTH]


def test_cores_and_memory_are_divided_and_the_operator_wins() -> None:
    alike = plan("--prefill 1 --decode 3").instances
    assert {told(i.command.argv, "--cpu-threads") for i in alike} == {"2"}
    assert {told(i.command.argv, "--mempool-dram") for i in alike} == {"1024MiB"}
    own = plan("--cpu-threads 5 --mempool-dram=3GiB --drain-timeout 9").instances[0].command.argv
    assert told(own, "--cpu-threads") == "5"
    assert told(own, "--mempool-dram") == "3GiB"
    assert told(own, "--drain-timeout") == "9"
    assert sum(word.startswith("--mempool-dram") for word in own) == 1


@pytest.mark.parametrize(
    ("accelerators", "flags", "devices", "fraction"),
    [
        (2, "", ["0", "1"], None),
        (4, "--tp 2", ["0", "2"], None),
        (1, "", ["0", "0"], "0.40"),
        (2, "--tp-size=2", ["0", "0"], "0.40"),
        (2, "--prefill 2 --decode 2", ["0", "1", "0", "1"], "0.40"),
        (1, "--mem-fraction-static 0.3", ["0", "0"], "0.3"),
    ],
)
def test_accelerators_are_given_out(
    accelerators: int, flags: str, devices: list[str], fraction: str | None
) -> None:
    instances = plan(flags, Machine(8, 16 * 2**30, accelerators)).instances
    assert [told(i.command.argv, "--base-gpu-id") for i in instances] == devices
    assert {told(i.command.argv, "--mem-fraction-static") for i in instances} == {fraction}
    assert all(told(i.command.argv, "--cpu-threads") is None for i in instances)


def test_unknown_flags_reach_every_instance_and_no_router() -> None:
    made = plan("--chunked-prefill-size 256 --policy prefix --router-arg=--log-level=debug")
    for instance in made.instances:
        assert told(instance.command.argv, "--chunked-prefill-size") == "256"
        assert "--policy" not in instance.command.argv
    assert told(made.router.argv, "--policy") == "prefix"
    assert "--log-level=debug" in made.router.argv
    assert "--chunked-prefill-size" not in made.router.argv


def test_the_api_key_reaches_everybody() -> None:
    made = plan("--api-key secret")
    for argv in (made.router.argv, *(i.command.argv for i in made.instances)):
        assert told(argv, "--api-key") == "secret"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--prefill 0", "can prefill"),
        ("--decode 0", "can prefill and one that can decode"),
        ("--prefill -1 --both 1", "negative"),
        ("--port 0", "not a port"),
        ("--port 70000", "not a port"),
        ("--role decode", "--role is set"),
        ("--router-url=http://elsewhere", "--router-url is set"),
    ],
)
def test_clusters_that_cannot_be_are_refused(arguments: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        plan(arguments)


def test_wildcard_hosts_are_reached_on_this_machine() -> None:
    assert plan("--host 0.0.0.0 --port 31000").router_url == "http://127.0.0.1:31000"
    assert plan("--host ::1 --port 31000").router_url == "http://[::1]:31000"


@pytest.mark.parametrize(
    ("args", "value"),
    [
        (["--a", "1"], "1"),
        (["--a=1"], "1"),
        (["--a", "1", "--a=2"], "2"),
        (["--a"], ""),
        (["--a", "--b"], ""),
        (["--ab", "1"], None),
        ([], None),
    ],
)
def test_flag_value(args: list[str], value: str | None) -> None:
    assert flag_value(args, ("--a",)) == value


def test_dram_shares_are_whole_and_bounded() -> None:
    poor = Machine(cores=1, available_bytes=100 * 2**20, accelerators=0)
    rich = Machine(cores=64, available_bytes=1024 * 2**30, accelerators=0)
    with_gpu = Machine(cores=64, available_bytes=1024 * 2**30, accelerators=8)
    assert dram_bytes(poor, 2) == 64 * 2**20
    assert dram_bytes(rich, 2) == 2 * 2**30
    assert dram_bytes(with_gpu, 2) == 64 * 2**30
    assert dram_bytes(CPU, 3) % (64 * 2**20) == 0
