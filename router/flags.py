"""Other ways to say the same: the spellings of sglang-router, and a file of settings.

An operator's ``python -m sglang_router.launch_router`` line (0.3.2) is understood as it is: what
has a name of its own here is translated, what has no meaning here is accepted and named in one
warning, and what would be dangerous to leave out is refused with a sentence that says what to do.
Pure but for reading the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sglang_memserve.errors import ConfigError

MAX_FILE_BYTES = 2**20

SPELLINGS = {
    "--request-timeout-secs": "--request-timeout-s",
    "--queue-timeout-secs": "--queue-timeout-s",
    "--shutdown-grace-period-secs": "--drain-timeout-s",
    "--max-payload-size": "--max-body-bytes",
    "--tokenizer-path": "--model-path",
    "--tls-cert-path": "--ssl-certfile",
    "--tls-key-path": "--ssl-keyfile",
    "--ca-cert-paths": "--instance-ca-certs",
    "--cors-allowed-origins": "--cors-origin",
}

# Taken as it is, but for -1, which is "no limit" there.
UNLIMITED = "--max-concurrent-requests"

POLICY_SPELLINGS = {
    "cache-aware": "cost",
    "power-of-two": "least-load",
    "random": "round-robin",
}
POLICY_REFUSED = {
    "manual": "policy manual has no counterpart: use session, which keeps requests with the same "
    "'session_id' (a field of the body, beside 'model') on one instance",
    "bucket": "policy bucket has no counterpart: use cost, which knows how long prompts are; or "
    "session, by 'session_id' (a field of the body, beside 'model')",
}


class Takes(Enum):
    """How many values follow a flag."""

    NOTHING = 0
    ONE = 1
    MANY = 2


def _without_effect() -> Iterator[tuple[str, Takes, str]]:
    ONE, MANY, NOTHING = Takes.ONE, Takes.MANY, Takes.NOTHING
    groups: tuple[tuple[str, Takes, str], ...] = (
        ("mini-lb pd-disaggregation", NOTHING, "roles are labels here"),
        ("prefill-policy decode-policy", ONE, "one policy chooses both"),
        (
            "cache-threshold balance-abs-threshold balance-rel-threshold eviction-interval-secs "
            "max-tree-size max-idle-secs assignment-mode bucket-adjust-interval-secs",
            ONE,
            "the tree is exact and follows the instances",
        ),
        ("dp-aware", NOTHING, "an instance spreads requests over its own data-parallel ranks"),
        (
            "worker-startup-timeout-secs worker-startup-check-interval",
            ONE,
            "listed URLs are asked until they answer",
        ),
        ("log-dir", ONE, "the log goes to standard error"),
        ("prometheus-port prometheus-host", ONE, "metrics are at /metrics of the router's port"),
        ("prometheus-duration-buckets", MANY, "buckets are fixed"),
        ("request-id-headers", MANY, "the header is x-request-id"),
        ("rate-limit-tokens-per-second", ONE, "requests in flight are bounded instead"),
        (
            "retry-max-retries retry-initial-backoff-ms retry-max-backoff-ms "
            "retry-backoff-multiplier retry-jitter-factor",
            ONE,
            "a request is tried on three instances, at once",
        ),
        ("disable-retries", NOTHING, "what has not been answered is always tried elsewhere"),
        (
            "cb-failure-threshold cb-success-threshold cb-timeout-duration-secs "
            "cb-window-duration-secs",
            ONE,
            "breakers are fixed",
        ),
        ("disable-circuit-breaker", NOTHING, "breakers are fixed"),
        (
            "health-failure-threshold health-success-threshold health-check-timeout-secs "
            "health-check-interval-secs health-check-endpoint",
            ONE,
            "see --heartbeat-s and --expire-s",
        ),
        ("disable-health-check", NOTHING, "see --heartbeat-s and --expire-s"),
        ("chat-template", ONE, "it is read from the model's folder"),
        ("tokenizer-cache-enable-l0 tokenizer-cache-enable-l1", NOTHING, "nothing is cached"),
        (
            "tokenizer-cache-l0-max-entries tokenizer-cache-l1-max-memory",
            ONE,
            "nothing is cached",
        ),
        ("reasoning-parser tool-call-parser", ONE, "instances parse what they generate"),
        ("history-backend", ONE, "conversations are not kept"),
        ("enable-trace", NOTHING, "there is no tracing"),
        ("otlp-traces-endpoint", ONE, "there is no tracing"),
        ("control-plane-audit-enabled", NOTHING, "changes are in the log"),
    )
    for names, takes, why in groups:
        for name in names.split():
            yield f"--{name}", takes, why


WITHOUT_EFFECT = {flag: (takes, why) for flag, takes, why in _without_effect()}

_DISCOVERY = "instances register themselves: start them with --router-url, or list their URLs"
_NO_MTLS = "the router has no certificate of its own to show to instances"
_CONTROL = "control routes are protected by --admin-key"
_DATABASE = "conversations are not kept, so there is no database"
REFUSED = {
    "--service-discovery": _DISCOVERY,
    "--selector": _DISCOVERY,
    "--service-discovery-port": _DISCOVERY,
    "--service-discovery-namespace": _DISCOVERY,
    "--prefill-selector": _DISCOVERY,
    "--decode-selector": _DISCOVERY,
    "--enable-igw": "a router serves one model: start one for each",
    "--client-cert-path": _NO_MTLS,
    "--client-key-path": _NO_MTLS,
    "--control-plane-api-keys": _CONTROL,
    "--jwt-issuer": _CONTROL,
    "--jwt-audience": _CONTROL,
    "--jwt-jwks-uri": _CONTROL,
    "--jwt-role-mapping": _CONTROL,
    "--mcp-config-path": "tools are run by clients",
    "--oracle-wallet-path": _DATABASE,
    "--oracle-tns-alias": _DATABASE,
    "--oracle-connect-descriptor": _DATABASE,
    "--oracle-username": _DATABASE,
    "--oracle-password": _DATABASE,
    "--oracle-pool-min": _DATABASE,
    "--oracle-pool-max": _DATABASE,
    "--oracle-pool-timeout-secs": _DATABASE,
    "--postgres-db-url": _DATABASE,
    "--postgres-pool-max": _DATABASE,
    "--redis-url": _DATABASE,
    "--redis-pool-max": _DATABASE,
    "--redis-retention-days": _DATABASE,
}


@dataclass(frozen=True, slots=True)
class Translated:
    """``argv`` in this router's own flags; ``warning`` names what has no effect, if anything."""

    argv: list[str]
    warning: str


def translate(argv: Sequence[str]) -> Translated:
    """Raises ConfigError, one line, for a flag that cannot be left out and a file that is none."""
    words = _with_file(argv)
    out: list[str] = []
    idle: dict[str, str] = {}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        flag, equals, value = word.partition("=")
        if flag in REFUSED:
            raise ConfigError(f"{flag}: {REFUSED[flag]}")
        if flag in WITHOUT_EFFECT:
            takes, idle[flag] = WITHOUT_EFFECT[flag]
            if not equals:
                at += _values(words[at:], takes)
        elif flag == "--backend":
            value, at = (value, at) if equals else ("".join(words[at : at + 1]), at + 1)
            if value != "sglang":
                raise ConfigError(f"--backend {value}: instances are SGLang servers")
        elif flag == UNLIMITED and "-1" in (value, *words[at : at + 1]):
            idle[f"{flag} -1"] = "some limit always holds"
            at += not equals
        else:
            out.append(SPELLINGS.get(flag, flag) + equals + value)
    listed = ", ".join(f"{flag} ({why})" for flag, why in idle.items())
    return Translated(out, f"accepted, and without effect here: {listed}" if idle else "")


def policy_name(given: str) -> str:
    """The policy that ``given`` names here. Raises ConfigError for one without a counterpart."""
    name = given.replace("_", "-")
    if name in POLICY_REFUSED:
        raise ConfigError(POLICY_REFUSED[name])
    return POLICY_SPELLINGS.get(name, name)


def _values(rest: Sequence[str], takes: Takes) -> int:
    """How many of ``rest`` belong to the flag before it."""
    if takes is Takes.NOTHING:
        return 0
    if takes is Takes.ONE:
        return min(len(rest), 1)
    return next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))


# -- a file of settings --


def _with_file(argv: Sequence[str]) -> list[str]:
    """``argv`` without ``--config FILE``, what the file says before it: a command line wins, and
    adds to what is listed."""
    rest: list[str] = []
    files: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        files.append(value if equals else next(words, ""))
    if len(files) > 1:
        raise ConfigError("--config is given more than once")
    return [*(_read(Path(files[0])) if files else []), *rest]


def _read(path: Path) -> list[str]:
    # Not needed by most, and not small.
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"--config {path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
        settings = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: no YAML: {line}") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: must be a mapping of flags to values")
    # YAML itself lets the last one win, and a flag may be repeated on a command line.
    names = [key.value for key, _ in root.value]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--config {path}: {', '.join(twice)} named twice: give one list")
    words: list[str] = []
    for name, value in settings.items():
        if not isinstance(name, str) or not name or name in ("config", "help"):
            raise ConfigError(f"--config {path}: {name!r} is no setting")
        words += _flag("--" + name.replace("_", "-"), value, path)
    return words


def _flag(flag: str, value: Any, path: Path) -> list[str]:
    """``true`` is the bare flag, ``false`` and nothing leave it out, a list repeats it; a list in
    a list is several words behind one flag."""
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if not isinstance(value, list):
        return [flag, _word(flag, value, path)]
    words: list[str] = []
    for item in value:
        inner = item if isinstance(item, list) else [item]
        words += [flag, *(_word(flag, one, path) for one in inner)]
    return words


def _word(flag: str, value: Any, path: Path) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"--config {path}: {flag[2:]} has a value that is no word or number")
    return str(value)
