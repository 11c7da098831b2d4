"""Where the ranks of other instances listen: told by a router, or asked of the instance itself."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp

from ..errors import PeerError, PeerUnreachable, ProtocolError
from ..protocol.http import InstanceInfo, PeerInfo, decode

_ASK_S = 5.0
_MOST = 256


class Sources:
    """By URL. Bounded: what was asked for is forgotten when there is too much of it."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._ranks: dict[str, list[str]] = {}

    def learn(self, peers: Sequence[PeerInfo]) -> None:
        """A router's word replaces what was known of those it names."""
        self._make_room(len(peers))
        self._ranks.update({peer.url: peer.ranks for peer in peers[:_MOST]})

    def forget(self, url: str) -> None:
        """Its ranks did not answer: it may have come back with other ports."""
        self._ranks.pop(url, None)

    async def resolve(self, url: str) -> list[str]:
        """``peer_address`` of each rank. Raises PeerError when the instance does not say."""
        known = self._ranks.get(url)
        if known is not None:
            return known
        ranks = await self._ask(url)
        self._make_room(1)
        self._ranks[url] = ranks
        return ranks

    async def _ask(self, url: str) -> list[str]:
        try:
            timeout = aiohttp.ClientTimeout(total=_ASK_S)
            async with self._session.get(f"{url}/memserve/info", timeout=timeout) as response:
                if response.status != 200:
                    raise PeerError(f"{url}/memserve/info answered {response.status}")
                info = decode(await response.read(), InstanceInfo, f"{url}/memserve/info")
        except ProtocolError as error:
            raise PeerError(str(error)) from error
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # ValueError: its URL cannot be parsed, or its host not looked up.
            text = f"{url}/memserve/info: {error or type(error).__name__}"
            raise PeerUnreachable(text) from error
        return [rank.peer_address for rank in info.ranks]

    def _make_room(self, count: int) -> None:
        if len(self._ranks) + count > _MOST:
            self._ranks.clear()
