"""The longest match: the request goes where most of it is, then to the idlest of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..values import InstanceView, Plan, Prompt
from .base import Rotation, by_load, cached_pages, complete, decode_candidates


@dataclass(frozen=True, slots=True)
class Prefix:
    rotation: Rotation
    bypass_tokens: int | None = None

    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        """See ``base.Policy``."""

        def longest(among: Sequence[InstanceView]) -> InstanceView:
            most = max(cached_pages(prompt, view) for view in among)
            tied = [view for view in among if cached_pages(prompt, view) == most]
            return by_load(tied, self.rotation.turn)

        decode = longest(decode_candidates(views))
        held = cached_pages(prompt, decode) * prompt.page_size
        why = f"longest prefix ({held} of {prompt.tokens} tokens)"
        return complete(prompt, decode, views, longest, self.bypass_tokens, why)
