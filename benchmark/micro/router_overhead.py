"""What the router adds to a request: the same requests to a trivial instance, with and without it.

The instance answers at once, so that the difference is the router's own time: parsing, tokenizing,
hashing, matching, planning and passing on. Requests to both go out in turns over kept connections;
each of the three processes is its own. JSON goes to standard output or ``--json FILE``.

    python benchmark/micro/router_overhead.py [--requests 400] [--tokens 1500] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.protocol.events import Snapshot, encode_snapshot
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import InstanceInfo, RankInfo
from sglang_memserve.types import Namespace

START_S = 30.0
TEXT = "the quick brown fox jumps over lazy dog while seven old wizards mix potions"
WORDS = tuple(TEXT.split(" "))
ANSWER = b'{"text":"ok","meta_info":{"cached_tokens":0}}'
FRAMES = (b'data: {"text":"a"}\n\n', b"data: [DONE]\n\n")


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 2,000 entries with a chat template: its work is that of a real one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )


async def serve_instance(port: int, folder: str) -> None:
    """The trivial instance: HTTP by hand, so that it costs next to nothing itself."""
    namespace = Namespace("m", "w", "bfloat16", 16, 1, 1, 64, 64, 0, 1)
    url = f"http://127.0.0.1:{port}"
    info = InstanceInfo(
        protocol=1,
        url=url,
        generation="boot",
        role="both",
        model_path=folder,
        served_model_name="m",
        layout_hash=layout_hash(namespace),
        namespace=namespace,
        page_size=16,
        context_length=100_000,
        max_total_tokens=100_000,
        events_address="tcp://127.0.0.1:9",
        ranks=[RankInfo(0, "tcp://127.0.0.1:9", "tcp://127.0.0.1:9", 1, namespace.block_bytes)],
    )
    fixed = {
        b"/memserve/info": msgspec.json.encode(info),
        b"/memserve/stats": b'{"event_seq":-1,"instance":{},"ranks":[{}]}',
        b"/memserve/snapshot": encode_snapshot(Snapshot("boot", -1, [])),
        b"/v1/loads": b'{"loads":[]}',
        b"/tokenize": b"{}",
    }

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                at = head.lower().find(b"content-length: ")
                size = int(head[at + 16 : head.index(b"\r", at)]) if at > 0 else 0
                body = await reader.readexactly(size)
                path = head.split(b" ", 2)[1].split(b"?")[0]
                if b'"stream":true' in body:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                        b"Transfer-Encoding: chunked\r\n\r\n"
                    )
                    for frame in FRAMES:
                        writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
                        await asyncio.sleep(0)
                    writer.write(b"0\r\n\r\n")
                    continue
                answer = fixed.get(path, ANSWER)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(answer), answer)
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port, limit=2**22)
    async with server:
        await server.serve_forever()


def prompt_of(tokens: int, number: int) -> str:
    words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(tokens - 1)]
    return " ".join([f"{number:05d}", *words])


def bodies_of(kind: str, tokens: int, number: int) -> tuple[str, dict[str, Any]]:
    text = prompt_of(tokens, number)
    if kind == "input_ids":
        ids = [(number * 31 + i) % 2000 for i in range(tokens)]
        return "/generate", {"input_ids": ids}
    if kind == "chat":
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}
    return "/generate", {"text": text, **({"stream": True} if kind == "stream" else {})}


async def one(http: aiohttp.ClientSession, url: str, data: bytes) -> float:
    """Milliseconds to the first byte of the answer's body; the rest is read as well."""
    started = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    async with http.post(url, data=data, headers=headers) as response:
        await response.content.readany()
        first = time.perf_counter()
        await response.read()
        assert response.status == 200, await response.text()
    return (first - started) * 1e3


async def measure(
    kind: str, direct: str, router: str, requests: int, tokens: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {"direct": [], "router": []}
    async with aiohttp.ClientSession() as http:
        for number in range(-20, requests):
            path, body = bodies_of(kind, tokens, number + 20)
            data = json.dumps(body, separators=(",", ":")).encode()
            pairs = [("direct", direct), ("router", router)]
            for name, base in pairs if number % 2 else reversed(pairs):
                took = await one(http, base + path, data)
                if number >= 0:
                    times[name].append(took)
    return {
        f"{name}_p{point}_ms": round(quantile(values, point), 3)
        for name, values in times.items()
        for point in (50, 99)
    } | {
        f"added_p{point}_ms": round(
            quantile(times["router"], point) - quantile(times["direct"], point), 3
        )
        for point in (50, 99)
    }


def quantile(values: Sequence[float], point: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[point - 1]


def free_port() -> int:
    (port,) = free_ports(1, taken=set())
    return port


async def until_ready(url: str) -> None:
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < deadline:
            try:
                async with http.get(f"{url}/readiness") as response:
                    members = (await response.json())["members"]
                    if members and all(one["source"] == "exact" for one in members):
                        # The tokenizer is loaded at the same time.
                        await asyncio.sleep(0.5)
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.05)
    raise SystemExit("the router did not become ready")


def start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)


async def run_kinds(direct: str, routed: str, arguments: argparse.Namespace) -> dict[str, Any]:
    await until_ready(routed)
    return {
        kind: await measure(kind, direct, routed, arguments.requests, arguments.tokens)
        for kind in ("text", "chat", "stream", "input_ids")
    }


def run(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    instance, router = str(free_port()), str(free_port())
    direct, routed = f"http://127.0.0.1:{instance}", f"http://127.0.0.1:{router}"
    quiet = ("--policy", arguments.policy, "--log-level", "warning")
    processes = (
        start(__file__, "--serve", instance, "--folder", folder),
        start("-m", "sglang_memserve.router", "--port", router, "--instance", direct, *quiet),
    )
    try:
        kinds = asyncio.run(run_kinds(direct, routed, arguments))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=START_S)
    return {
        "benchmark": "router_overhead",
        "command": " ".join(["python", "benchmark/micro/router_overhead.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "tokens": arguments.tokens,
        "requests": arguments.requests,
        "policy": arguments.policy,
        "kinds": kinds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve_instance(arguments.serve, arguments.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder))
        result = run(arguments, folder)
    text = json.dumps(result, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
