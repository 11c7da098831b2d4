"""The peers of a rank: whom it can talk to, and whom its transport can read from.

Belongs to the agent's thread. A peer is known by the address of its control socket. ``PeerTable``
opens the link, greets (namespaces are compared, the transport learns the peer's memory), and
forgets peers that nobody has used for a while. ``members`` keeps some of them for longer.

Of a peer that is only idle, the link is closed and the transport's connection kept: NIXL 1.5 never
closes UCX's end of a connection to a process that lives (its issue 2025), so that disconnecting and
connecting again would leave one more socket on both sides each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ..config import Limits
from ..errors import LimitExceeded, TransferFailed
from ..protocol import handshake
from ..protocol.control import Hello, HelloReply, Message
from .base import Transport
from .port import Greeting


class Link(Protocol):
    """A connection to one peer's control socket. Sending never waits; a full queue drops."""

    def send(self, request_id: int, message: Message) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Peer:
    """``connected`` is what our transport knows; ``greeting`` what fetches may rely on."""

    address: str
    link: Link
    used_s: float
    greeting: Greeting | None = None
    connected: Greeting | None = None


class PeerTable:
    """``open_link`` raises ProtocolError for an address that is none. ``in_use`` says whether a
    fetch runs from a peer or a read from it has not ended: such a peer is never forgotten."""

    def __init__(
        self,
        transport: Transport,
        hello: Hello,
        open_link: Callable[[str], Link],
        limits: Limits,
        *,
        in_use: Callable[[Peer], bool],
    ) -> None:
        self.limits = limits
        self._transport = transport
        self._hello = hello
        self._open_link = open_link
        self._keepers = [in_use]
        self._peers: dict[str, Peer] = {}
        # Connections without a link, by address, the longest idle first; at most ``max_peers``.
        self._idle: dict[str, Greeting] = {}
        # What each connection of the transport was made of, and the peer that it is of.
        self._made_of: dict[str, tuple[str, bytes]] = {}
        self._next_request = 1

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def keep_while(self, wanted: Callable[[Peer], bool]) -> None:
        """Peers for which ``wanted`` is true are not forgotten either."""
        self._keepers.append(wanted)

    def get(self, address: str) -> Peer | None:
        return self._peers.get(address)

    def obtain(self, address: str, now: float) -> Peer:
        """The peer at ``address``, linked when it is new.

        Raises LimitExceeded when all that are known are in use, ProtocolError for an address that
        is none."""
        peer = self._peers.get(address)
        if peer is None:
            if len(self._peers) >= self.limits.max_peers:
                self._forget_idle(now, 0.0)
            if len(self._peers) >= self.limits.max_peers:
                raise LimitExceeded(f"{len(self._peers)} peers are in use")
            peer = Peer(address, self._open_link(address), now)
            peer.connected = self._idle.pop(address, None)
            self._peers[address] = peer
        peer.used_s = now
        return peer

    def send(self, peer: Peer, message: Message) -> int:
        """Returns the request id, which no other message of this rank has."""
        self._next_request += 1
        peer.link.send(self._next_request, message)
        return self._next_request

    def greet(self, peer: Peer, reply: HelloReply) -> Greeting:
        """Check the peer and make its memory readable.

        Raises NamespaceMismatch, VersionMismatch, TransferFailed."""
        handshake.require_same_version(reply.version)
        handshake.require_same_namespace(
            self._hello.namespace, reply.namespace, self._hello.instance_id, reply.instance_id
        )
        if peer.connected is None or peer.connected.generation != reply.generation:
            self.disconnect(peer)
            peer.connected = self._connect(peer, reply)
        elif peer.connected.memory_version < reply.memory_version:
            # In place: what is being read from it goes on.
            peer.connected = self._connect(peer, reply)
        peer.greeting = peer.connected
        return peer.connected

    def _connect(self, peer: Peer, reply: HelloReply) -> Greeting:
        metadata = reply.transport_metadata
        name = self._transport.name_in(metadata)
        owner, known = self._made_of.get(name, (peer.address, metadata))
        if owner != peer.address and known != metadata:
            # The library would take it for news of the other, and what breaks then is the other.
            raise TransferFailed(f"{peer.address} names itself {name}, as {owner} does")
        connected = self._transport.connect(metadata)
        self._made_of[name] = (owner, metadata)
        return Greeting(reply.generation, connected, tuple(reply.memory), reply.memory_version)

    def disconnect(self, peer: Peer) -> None:
        """The transport has to learn the peer anew, and the peer to be greeted."""
        peer.greeting = None
        if peer.connected is not None:
            self._disconnect(peer.connected)
            peer.connected = None

    def forget(self, peer: Peer) -> bool:
        """Close the link and the connection. False while the peer is in use: try again later."""
        if self._peers.get(peer.address) is not peer:
            return True
        if not self._unlink(peer):
            return False
        self.disconnect(peer)
        return True

    def on_time(self, now: float) -> None:
        self._forget_idle(now, self.limits.peer_idle_s)

    def close(self) -> None:
        """The transport is closed by its owner, which ends the connections."""
        for peer in self._peers.values():
            peer.link.close()
        self._peers.clear()

    def stats(self) -> dict[str, float]:
        return {"peers": len(self._peers)}

    def check(self) -> None:
        assert len(self._peers) <= self.limits.max_peers
        assert len(self._idle) <= self.limits.max_peers
        assert not self._idle.keys() & self._peers.keys()
        connected = [peer.connected for peer in self._peers.values() if peer.connected is not None]
        names = {greeting.transport_name for greeting in [*connected, *self._idle.values()]}
        assert self._made_of.keys() <= names, self._made_of.keys() - names
        for address, peer in self._peers.items():
            assert peer.address == address
            assert peer.greeting is None or peer.greeting == peer.connected

    def _forget_idle(self, now: float, idle_s: float) -> None:
        for peer in self:
            if now - peer.used_s < idle_s or not self._unlink(peer) or peer.connected is None:
                continue
            self._idle[peer.address] = peer.connected
            if len(self._idle) > self.limits.max_peers:
                longest = next(iter(self._idle))
                self._disconnect(self._idle.pop(longest))

    def _disconnect(self, connected: Greeting) -> None:
        self._made_of.pop(connected.transport_name, None)
        self._transport.disconnect(connected.transport_name)

    def _unlink(self, peer: Peer) -> bool:
        """Whether nobody needs the peer; its link is closed then."""
        if any(wants(peer) for wants in self._keepers):
            return False
        peer.link.close()
        peer.greeting = None
        del self._peers[peer.address]
        return True
