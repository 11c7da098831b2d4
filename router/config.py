"""The router's settings: the command line, parsed and checked once, frozen.

``flags`` accepts the spellings of sglang-router as well, and a file of settings.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from sglang_memserve.config import parse_size, parse_url
from sglang_memserve.errors import ConfigError
from sglang_memserve.types import InstanceId, Role

from .flags import policy_name, translate
from .http.limits import Limits
from .http.security import Keys, Tls
from .policy.registry import POLICIES
from .values import Moves

MAX_PROCESSES = 64
TOKENIZER = "tokenizer.json"
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_LOG_LEVEL_SPELLINGS = {"warn": "warning"}


@dataclass(frozen=True, slots=True)
class StaticInstance:
    """A listed URL. ``role`` is None when the instance's own word counts."""

    url: InstanceId
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Durations are seconds. ``bypass_tokens``: see ``policy.registry.make_policy``.

    ``model_path``: folder of the tokenizer, where it is not the instances' model path.
    ``warning``: what was asked for and has no effect, if anything.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    processes: int = 1
    instances: tuple[StaticInstance, ...] = ()
    policy: str = "cost"
    bypass_tokens: int | None = None
    moves: Moves = Moves.ALL
    model_path: str | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    tls: Tls = field(default_factory=Tls)
    cors_origins: tuple[str, ...] = ()
    heartbeat_s: float = 2.0
    expire_s: float = 10.0
    request_timeout_s: float = 600.0
    connect_timeout_s: float = 3.0
    stall_timeout_s: float = 120.0
    fetch_timeout_s: float = 10.0
    drain_timeout_s: float = 30.0
    max_body_bytes: int = 64 * 2**20
    max_concurrent_requests: int = 4096
    queue_size: int = 1024
    queue_timeout_s: float = 30.0
    log_level: str = "info"
    warning: str = ""

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("--host must not be empty")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port must be in 1..65535, got {self.port}")
        if not 1 <= self.processes <= MAX_PROCESSES:
            raise ConfigError(f"--processes must be in 1..{MAX_PROCESSES}, got {self.processes}")
        if self.policy not in POLICIES:
            raise ConfigError(f"unknown policy {self.policy!r}: choose one of {_policy_names()}")
        if self.bypass_tokens is not None and self.bypass_tokens < 0:
            raise ConfigError(f"--bypass-tokens must not be negative, got {self.bypass_tokens}")
        for name in (
            "heartbeat_s",
            "expire_s",
            "request_timeout_s",
            "fetch_timeout_s",
            "connect_timeout_s",
            "stall_timeout_s",
            "drain_timeout_s",
            "queue_timeout_s",
        ):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be positive and finite, got {value}")
        if self.max_concurrent_requests <= 0 or self.queue_size < 0:
            raise ConfigError(
                "--max-concurrent-requests must be positive and --queue-size not negative, "
                f"got {self.max_concurrent_requests} and {self.queue_size}"
            )
        if self.expire_s <= self.heartbeat_s:
            raise ConfigError(
                f"--expire-s ({self.expire_s}) must be longer than --heartbeat-s "
                f"({self.heartbeat_s}): every instance would be dropped"
            )
        if self.max_body_bytes <= 0:
            raise ConfigError(f"--max-body-bytes must be positive, got {self.max_body_bytes}")
        for name in ("api_key", "admin_key"):
            key = getattr(self, name)
            if key is not None and not (key and key.isascii() and key.isprintable()):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be printable ASCII, and not empty")
        for origin in self.cors_origins:
            if origin != "*" and parse_url(origin) != origin:
                raise ConfigError(f"--cors-origin {origin}: write it as http(s)://host[:port]")
        if self.log_level not in _LOG_LEVELS:
            raise ConfigError(
                f"unknown log level {self.log_level!r}: choose one of {', '.join(_LOG_LEVELS)}"
            )
        urls = [instance.url for instance in self.instances]
        for url in urls:
            if urls.count(url) > 1:
                raise ConfigError(f"{url} is listed more than once")

    def require_tokenizer(self) -> None:
        """Raises ConfigError where ``model_path`` was given and holds no tokenizer."""
        if self.model_path is not None and not Path(self.model_path, TOKENIZER).is_file():
            raise ConfigError(
                f"--model-path {self.model_path}: no {TOKENIZER} there. Give the model's folder, "
                "or leave the flag out: then the instances' own is used"
            )

    @property
    def limits(self) -> Limits:
        return Limits(
            max_body_bytes=self.max_body_bytes,
            max_in_flight=self.max_concurrent_requests,
            max_waiting=self.queue_size,
            wait_s=self.queue_timeout_s,
        )

    @property
    def keys(self) -> Keys:
        return Keys(self.api_key, self.admin_key)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = " (--help lists the flags)" if message.startswith("unrecognized") else ""
        raise ConfigError(message + hint)


def parse_args(argv: Sequence[str] | None = None) -> RouterConfig:
    """Raises ConfigError, one line, for anything wrong; ``--help`` prints and exits."""
    translated = translate(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(translated.argv)
    instances = [StaticInstance(_url(url)) for url in args.instance + _flat(args.worker_urls)]
    instances += [StaticInstance(_paired(words), Role.PREFILL) for words in args.prefill]
    instances += [StaticInstance(_url(url), Role.DECODE) for url in _flat(args.decode)]
    level = args.log_level.lower()
    return RouterConfig(
        host=args.host,
        port=args.port,
        processes=args.processes,
        instances=tuple(instances),
        policy=policy_name(args.policy),
        bypass_tokens=args.bypass_tokens,
        moves=_moves(args.moves),
        model_path=args.model_path,
        api_key=args.api_key,
        admin_key=args.admin_key,
        tls=Tls(
            certfile=args.ssl_certfile,
            keyfile=args.ssl_keyfile,
            keyfile_password=args.ssl_keyfile_password,
            ca_certs=args.ssl_ca_certs,
            instance_ca_certs=args.instance_ca_certs,
        ),
        cors_origins=tuple(_flat(args.cors_origin)),
        heartbeat_s=args.heartbeat_s,
        expire_s=args.expire_s,
        request_timeout_s=args.request_timeout_s,
        connect_timeout_s=args.connect_timeout_s,
        stall_timeout_s=args.stall_timeout_s,
        drain_timeout_s=args.drain_timeout_s,
        max_concurrent_requests=args.max_concurrent_requests,
        queue_size=args.queue_size,
        queue_timeout_s=args.queue_timeout_s,
        fetch_timeout_s=args.fetch_timeout_s,
        max_body_bytes=parse_size(args.max_body_bytes),
        log_level=_LOG_LEVEL_SPELLINGS.get(level, level),
        warning=translated.warning,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sglang_memserve.router",
        description="One URL for many SGLang instances that share their KV cache.",
        epilog="sglang-router's flags are accepted as well. Durations are seconds.",
        allow_abbrev=False,
    )
    _add_serving(parser)
    _add_instances(
        parser.add_argument_group(
            "instances", "Instances started with --router-url register themselves."
        )
    )
    _add_routing(parser.add_argument_group("routing"))
    _add_security(parser.add_argument_group("keys, TLS, browsers"))
    _add_limits(parser.add_argument_group("deadlines and bounds"))
    return parser


def _add_serving(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, RouterConfig()
    add("--config", metavar="FILE", help="flags and their values in YAML; the command line wins")
    add("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=defaults.port, help="port to listen on (default: %(default)s)")
    add(
        "--processes",
        type=int,
        default=defaults.processes,
        metavar="N",
        help="processes behind the port (default: %(default)s)",
    )
    add(
        "--log-level",
        default=defaults.log_level,
        metavar="LEVEL",
        help=f"{', '.join(_LOG_LEVELS)} (default: %(default)s)",
    )


def _add_instances(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--instance",
        action="append",
        default=[],
        metavar="URL",
        help="list an instance, or a plain SGLang server; may be given again (default: none)",
    )
    add(
        "--worker-urls",
        action="append",
        nargs="*",
        default=[],
        metavar="URL",
        help="the same, several at a time (default: none)",
    )
    add(
        "--prefill",
        action="append",
        nargs="+",
        default=[],
        metavar=("URL", "PORT"),
        help="list one for prefill; a bootstrap port is accepted and not needed (default: none)",
    )
    add(
        "--decode",
        action="append",
        nargs="+",
        default=[],
        metavar="URL",
        help="list some for decode (default: none)",
    )
    defaults = RouterConfig()
    _seconds(add, "--heartbeat-s", defaults.heartbeat_s, "how often instances say that they live")
    _seconds(add, "--expire-s", defaults.expire_s, "who is silent that long gets nothing more")


def _add_routing(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--policy",
        default=RouterConfig().policy,
        metavar="NAME",
        help=f"{_policy_names()} (default: %(default)s)",
    )
    add(
        "--bypass-tokens",
        type=int,
        metavar="N",
        help="let the decode instance compute up to N uncached tokens itself; "
        "0: never a whole page (default: decide by cost)",
    )
    add(
        "--moves",
        default=RouterConfig().moves.value,
        metavar="WHICH",
        help=f"pages that may move between instances: {_moves_names()} (default: %(default)s)",
    )
    add("--model-path", metavar="DIR", help="tokenizer's folder (default: the instances' own)")


def _add_security(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--api-key", metavar="KEY", help="asked of clients, sent to instances (default: none)")
    add(
        "--admin-key",
        "--admin-api-key",
        metavar="KEY",
        help="asked for workers, flush, weights and the like (default: the API key)",
    )
    add(
        "--cors-origin",
        action="append",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="let browsers' scripts of these origins in (default: none)",
    )
    add("--ssl-certfile", metavar="FILE", help="serve https with this certificate (default: http)")
    add("--ssl-keyfile", metavar="FILE", help="its key (default: in the certificate's file)")
    add("--ssl-keyfile-password", metavar="WORD", help="opens the key (default: none)")
    add(
        "--ssl-ca-certs",
        metavar="FILE",
        help="clients need a certificate of these authorities (default: none is asked for)",
    )
    add(
        "--instance-ca-certs",
        metavar="FILE",
        help="who vouches for https instances (default: the system's authorities)",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add, defaults = group.add_argument, RouterConfig()
    _seconds(add, "--request-timeout-s", defaults.request_timeout_s, "a whole request")
    _seconds(add, "--connect-timeout-s", defaults.connect_timeout_s, "connecting to an instance")
    _seconds(
        add, "--stall-timeout-s", defaults.stall_timeout_s, "between two frames of an event stream"
    )
    _seconds(
        add, "--fetch-timeout-s", defaults.fetch_timeout_s, "one instance's fetch from another"
    )
    _seconds(
        add,
        "--drain-timeout-s",
        defaults.drain_timeout_s,
        "what runs may go on after a SIGTERM",
    )
    add(
        "--max-concurrent-requests",
        type=int,
        default=defaults.max_concurrent_requests,
        metavar="N",
        help="what comes beyond waits in a queue (default: %(default)s)",
    )
    add(
        "--queue-size",
        type=int,
        default=defaults.queue_size,
        metavar="N",
        help="what comes beyond is refused with 429 (default: %(default)s)",
    )
    _seconds(add, "--queue-timeout-s", defaults.queue_timeout_s, "waiting in it; then 429")
    add(
        "--max-body-bytes",
        default=str(defaults.max_body_bytes),
        metavar="SIZE",
        help="of a request, in bytes or as 64MiB (default: %(default)s bytes)",
    )


def _seconds(add: Callable[..., argparse.Action], flag: str, default: float, what: str) -> None:
    add(
        flag,
        type=float,
        default=default,
        metavar="S",
        help=f"{what}, in seconds (default: %(default)g)",
    )


def _moves(name: str) -> Moves:
    try:
        return Moves(name)
    except ValueError:
        raise ConfigError(f"unknown --moves {name!r}: choose one of {_moves_names()}") from None


def _moves_names() -> str:
    return ", ".join(moves.value for moves in Moves)


def _policy_names() -> str:
    return ", ".join(POLICIES)


def _flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [word for group in groups for word in group]


def _url(text: str) -> InstanceId:
    return InstanceId(parse_url(text))


def _paired(words: Sequence[str]) -> InstanceId:
    """sglang-router's ``--prefill URL [BOOTSTRAP_PORT|none]``."""
    if len(words) > 2 or (len(words) == 2 and not (words[1].isdigit() or words[1] == "none")):
        raise ConfigError(f"--prefill takes one URL, and maybe a port; got {' '.join(words)!r}")
    return _url(words[0])
