"""Each instance in turn, whatever it holds and however busy it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..values import InstanceView, Plan, Prompt
from .base import Rotation, complete, decode_candidates


@dataclass(frozen=True, slots=True)
class RoundRobin:
    rotation: Rotation
    bypass_tokens: int | None = None

    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        """See ``base.Policy``."""

        def next_of(among: Sequence[InstanceView]) -> InstanceView:
            return among[self.rotation.turn % len(among)]

        decode = next_of(decode_candidates(views))
        return complete(prompt, decode, views, next_of, self.bypass_tokens, "round robin")
