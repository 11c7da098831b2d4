"""Timing prompts that are computed together. Pure.

An engine that has several prompts computes them one after the other or in one batch, as it likes;
what each of them took cannot be told from when it was answered. What all of them took can: from the
moment the first was sent to an idle instance until nothing was left there. The model of prefill is
linear in its coefficients, so the sums over such a spell fit it as well as a single prompt does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_memserve.types import InstanceId

# A longer one is not learnt from: most of what it would tell came before.
MOST_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class Computed:
    """One prompt: tokens computed, and those that were cached before them."""

    new_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Spell:
    prompts: tuple[Computed, ...]
    seconds: float


@dataclass(slots=True)
class _Running:
    started: float
    at_work: int = 0
    clean: bool = True
    prompts: list[Computed] = field(default_factory=list)


class Spells:
    """By instance; memory: those at work."""

    def __init__(self) -> None:
        self._running: dict[InstanceId, _Running] = {}

    def begin(self, instance: InstanceId, now: float) -> None:
        """A prompt is sent there. Followed by exactly one ``end``."""
        running = self._running.setdefault(instance, _Running(now))
        running.at_work += 1

    def spoil(self, instance: InstanceId) -> None:
        """Somebody else's work is there too: what goes on now tells nothing."""
        if instance in self._running:
            self._running[instance].clean = False

    def end(self, instance: InstanceId, now: float, computed: Computed | None) -> Spell | None:
        """The prompt is answered, with what was ``computed``, or has failed (None). The whole
        spell, if it is over and tells something."""
        running = self._running[instance]
        running.at_work -= 1
        if computed is None or len(running.prompts) >= MOST_PROMPTS:
            running.clean = False
        else:
            running.prompts.append(computed)
        if running.at_work:
            return None
        del self._running[instance]
        if not running.clean or not running.prompts:
            return None
        return Spell(tuple(running.prompts), now - running.started)

    def check(self) -> None:
        for instance, running in self._running.items():
            assert running.at_work > 0, instance
            assert len(running.prompts) <= MOST_PROMPTS, instance
