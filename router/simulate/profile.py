"""What an instance can do: how long its work takes and how much it holds. JSON files.

Two come with the package (``h100-llama-70b``, ``cpu-smollm2-135m``); ``source`` says where their
figures are from, and ``estimates`` which of them nobody has measured.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path

import msgspec
from sglang_memserve.errors import ConfigError

_MOST_BYTES = 2**20


class _Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int | float) and not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number that is not negative")


class Prefill(_Figures, frozen=True, forbid_unknown_fields=True):
    """A step computes up to ``chunk_tokens`` of the prompts that wait, first come first served:
    ``fixed_s``, and for ``new`` tokens of a prompt that goes on after ``before`` of them
    ``new * (token_s + pair_s * (before + new / 2))``."""

    fixed_s: float
    token_s: float
    pair_s: float
    chunk_tokens: int

    def tokens_s(self, new: int, before: int) -> float:
        """Without what a step costs by itself."""
        return new * (self.token_s + self.pair_s * (before + new / 2))


class Decode(_Figures, frozen=True, forbid_unknown_fields=True):
    """A step gives each stream one token: ``fixed_s + streams * stream_s + context_token_s * the
    tokens that all of them attend to``."""

    fixed_s: float
    stream_s: float
    context_token_s: float
    max_streams: int


class Link(_Figures, frozen=True, forbid_unknown_fields=True):
    """An instance's way to the others, the same out and in; it is shared fairly."""

    latency_s: float
    bytes_per_s: float


class Profile(_Figures, frozen=True, forbid_unknown_fields=True):
    """``hbm_tokens``: KV slots. ``load_bytes_per_s``: DRAM to HBM. ``hop_s``: one HTTP request
    between client, router and instance, there and back."""

    name: str
    model: str
    source: str
    estimates: list[str]
    kv_bytes_per_token: int
    hbm_tokens: int
    dram_bytes: int
    load_bytes_per_s: float
    hop_s: float
    prefill: Prefill
    decode: Decode
    link: Link

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("load_bytes_per_s", self.load_bytes_per_s),
            ("link.bytes_per_s", self.link.bytes_per_s),
            ("prefill.chunk_tokens", self.prefill.chunk_tokens),
            ("decode.max_streams", self.decode.max_streams),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive")


@cache
def shipped() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    found = (entry.name for entry in files(__package__).joinpath("profiles").iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in found if name.endswith(".json")))


def load(name: str) -> Profile:
    """A shipped profile by its name, or any by its file. Raises ConfigError."""
    try:
        if name in shipped():
            data = files(__package__).joinpath("profiles", f"{name}.json").read_bytes()
        else:
            with Path(name).open("rb") as file:
                data = file.read(_MOST_BYTES)
    except OSError as error:
        known = ", ".join(shipped())
        raise ConfigError(
            f"profile {name!r}: {error.strerror}; a file, or one of {known}"
        ) from error
    try:
        return msgspec.json.decode(data, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {name!r}: {error}") from error
