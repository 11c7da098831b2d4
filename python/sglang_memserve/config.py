"""Settings of one instance: parsed once at the edge, frozen, and carried to the ranks as JSON.

The launcher builds an ``InstanceConfig`` from the command line. SGLang hands
``InstanceConfig.to_json()`` to the linker of each scheduler process (``linker_extra_config``),
where ``InstanceConfig.from_json`` reads it again, once, and refuses anything it does not know.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil

from .errors import ConfigError
from .types import Checksums, Eviction, Generation, InstanceId, Role

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_MAX_NAME = 253
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([a-zA-Z]*)")

DEFAULT_DRAM = "2GiB"
DEFAULT_EVICTION = Eviction.TWO_QUEUE


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one rank, all of them; ``docs/transfer.md`` says what happens at each.

    Durations are seconds. Of leases granted to peers: ``max_leases``, ``max_leases_per_peer``,
    ``max_leased_bytes_per_peer``, and ``max_parked`` requests that wait for pages, of
    ``max_parked_pages`` together and ``max_parked_pages_per_peer``. Of fetches:
    ``max_fetches`` run and ``max_queued_fetches`` wait; each names at most ``max_sources``, has
    ``max_rounds`` leases of a source at a time, and ``max_reading_bytes_per_peer`` are on their
    way. Ended fetches pin at most ``max_grace_leases`` and ``grace_share`` of all blocks; for
    requests that have not come yet ``max_holds`` keep at most ``hold_share`` of them, each for
    ``max_hold_s`` at most. At most ``max_peers`` are known; one without use is hung up on after
    ``peer_idle_s``.
    """

    lease_ttl_s: float = 30.0
    lease_wait_s: float = 60.0
    fetch_deadline_s: float = 120.0
    connect_timeout_s: float = 2.0
    max_leases: int = 1024
    max_leases_per_peer: int = 256
    max_leased_bytes_per_peer: int = 8 << 30
    max_parked: int = 256
    max_parked_pages: int = 524_288
    max_parked_pages_per_peer: int = 65_536
    max_fetches: int = 8
    max_queued_fetches: int = 64
    max_pages_per_request: int = 65_536
    max_sources: int = 16
    max_rounds: int = 4
    max_round_bytes: int = 64 << 20
    max_reading_bytes_per_peer: int = 1 << 30
    max_grace_leases: int = 64
    grace_share: float = 0.25
    max_holds: int = 1024
    max_hold_s: float = 600.0
    hold_share: float = 0.5
    max_peers: int = 256
    peer_idle_s: float = 60.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"limit {item.name} must be positive and finite, got {value}")


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """All that MemServe knows about an instance before its engine starts.

    ``role`` is the role at boot; it can be changed later. ``peer_host`` is the host the ranks'
    peer and event sockets listen on and are reached at. ``runtime_dir`` is a private folder of
    this boot that holds the local sockets. ``mempool_dram_bytes`` is for all ranks together: their
    shards of a page are equal parts of it, so each rank gets an equal part of the memory.
    """

    role: Role
    url: InstanceId
    generation: Generation
    peer_host: str
    runtime_dir: str
    mempool_dram_bytes: int
    mempool_eviction: Eviction = DEFAULT_EVICTION
    router_urls: tuple[str, ...] = ()
    mempool_checksums: Checksums = Checksums.OFF
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.mempool_dram_bytes <= 0:
            raise ConfigError(f"mempool DRAM must be positive, got {self.mempool_dram_bytes} bytes")
        for name in ("url", "generation", "peer_host", "runtime_dir"):
            if not getattr(self, name):
                raise ConfigError(f"instance setting {name} must not be empty")

    def rank_socket(self, rank: int) -> Path:
        """A rank's ``local`` socket, for this machine's user only."""
        return Path(self.runtime_dir) / f"rank{rank}.sock"

    def rank_dram_bytes(self, tp_size: int) -> int:
        return self.mempool_dram_bytes // tp_size

    def to_json(self) -> dict[str, object]:
        """JSON-compatible form; ``from_json`` inverts it."""
        encoded: dict[str, object] = msgspec.to_builtins(self)
        return encoded

    @classmethod
    def from_json(cls, value: object) -> InstanceConfig:
        """Raises ConfigError for anything that ``to_json`` does not produce."""
        if not isinstance(value, dict):
            raise ConfigError(f"instance settings must be an object, got {type(value).__name__}")
        _require_exact_keys(cls, value)
        limits = value["limits"]
        if isinstance(limits, dict):
            _require_exact_keys(Limits, limits)
        try:
            return msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"instance settings: {error}") from error


def _require_exact_keys(cls: type[InstanceConfig] | type[Limits], value: dict[str, object]) -> None:
    known = {item.name for item in fields(cls)}
    unknown, missing = sorted(set(value) - known, key=str), sorted(known - set(value))
    if unknown or missing:
        raise ConfigError(f"{cls.__name__}: unknown settings {unknown}, missing settings {missing}")


def new_generation() -> Generation:
    return Generation(secrets.token_hex(8))


def parse_limits(texts: Iterable[str]) -> Limits:
    """``NAME=VALUE`` each; a size or a number. Raises ConfigError for what is no limit."""
    kinds = {item.name: item.type for item in fields(Limits)}
    changes: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise ConfigError(f"unknown limit {name!r}: choose one of {', '.join(kinds)}")
        try:
            whole = kinds[name] == "int"
            changes[name] = parse_size(value) if whole else float(value)
        except ValueError:
            raise ConfigError(f"limit {name}: {value!r} is no number") from None
    return replace(Limits(), **changes)  # type: ignore[arg-type]


def parse_checksums(text: str) -> Checksums:
    try:
        return Checksums(text)
    except ValueError:
        raise ConfigError(f"--mempool-checksums {text!r}: say on or off") from None


def parse_role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        names = ", ".join(role.value for role in Role)
        raise ConfigError(f"unknown role {text!r}: choose one of {names}") from None


def parse_eviction(text: str) -> Eviction:
    try:
        return Eviction(text)
    except ValueError:
        names = ", ".join(eviction.value for eviction in Eviction)
        raise ConfigError(f"unknown eviction policy {text!r}: choose one of {names}") from None


def parse_size(text: str) -> int:
    """Bytes of ``2GiB``, ``512MiB``, ``1.5gb`` or a plain number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"malformed size {text!r}: expected a number with a unit, such as 2GiB")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ConfigError(f"size {text!r} must be positive")
    return size


def parse_dram(text: str, machine_bytes: int | None = None) -> int:
    """Bytes of ``--mempool-dram``; refuses more than the machine has.

    ``machine_bytes`` is this machine's physical memory when not given.
    """
    size = parse_size(text)
    total = psutil.virtual_memory().total if machine_bytes is None else machine_bytes
    if size > total:
        raise ConfigError(
            f"--mempool-dram {text} is more than this machine's memory ({total / 2**30:.1f} GiB)"
        )
    return size


def parse_url(text: str) -> str:
    """An ``http(s)://host[:port]`` base URL without a trailing slash.

    The host is an address or a name that can be looked up, in ASCII (``xn--`` where it is not).
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"malformed URL {text!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"malformed URL {text!r}: expected http://host:port")
    if parts.query or parts.fragment or parts.username is not None or parts.path not in ("", "/"):
        raise ConfigError(f"malformed URL {text!r}: expected only a scheme, a host and a port")
    if not _is_host(parts.hostname):
        raise ConfigError(
            f"malformed URL {text!r}: {parts.hostname!r} is neither an address nor a host name "
            "(labels of 1 to 63 ASCII letters, digits, - and _)"
        )
    return f"{parts.scheme}://{parts.netloc}"


def _is_host(text: str) -> bool:
    if ":" in text:
        try:
            return bool(ipaddress.IPv6Address(text))
        except ValueError:
            return False
    name = text.removesuffix(".")
    return len(name) <= _MAX_NAME and all(map(_LABEL.fullmatch, name.split(".")))
