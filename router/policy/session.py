"""One client, one instance: rendezvous hashing of the session key.

Every instance gets a score for every session; the highest wins. When an instance leaves, only its
own sessions move, and when it is back they return. Requests without a session key go to the idlest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ..values import InstanceView, Plan, Prompt
from .base import Rotation, by_load, complete, decode_candidates


@dataclass(frozen=True, slots=True)
class Session:
    rotation: Rotation
    bypass_tokens: int | None = None

    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        """See ``base.Policy``."""
        session = prompt.session

        def home(among: Sequence[InstanceView]) -> InstanceView:
            if session is None:
                return by_load(among, self.rotation.turn)
            return max(among, key=lambda view: _score(session, view))

        decode = home(decode_candidates(views))
        why = "least load (no session)" if session is None else "session"
        return complete(prompt, decode, views, home, self.bypass_tokens, why)


def _score(session: str, view: InstanceView) -> bytes:
    # Length first, so that no session and URL run into each other.
    text = f"{len(session)}:{session}{view.id}"
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
