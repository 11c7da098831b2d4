"""The instance with the fewest requests, whatever it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..values import InstanceView, Plan, Prompt
from .base import Rotation, by_load, complete, decode_candidates


@dataclass(frozen=True, slots=True)
class LeastLoad:
    rotation: Rotation
    bypass_tokens: int | None = None

    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        """See ``base.Policy``."""

        def idlest(among: Sequence[InstanceView]) -> InstanceView:
            return by_load(among, self.rotation.turn)

        decode = idlest(decode_candidates(views))
        return complete(prompt, decode, views, idlest, self.bypass_tokens, "least load")
