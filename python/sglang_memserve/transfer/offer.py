"""The paper's ``transfer_with_insert``, from the sender's side: asks a peer to fetch from us.

The receiver still reads, leases and publishes as in any fetch: data first, index after. A rank
takes offers only if it was made to, since whoever reaches its peer socket could otherwise have it
publish pages that nobody checked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from enum import Enum

import zmq

from ..errors import PeerUnreachable, ProtocolError
from ..protocol.control import ErrorReply, FetchReply, OfferRequest, as_received
from ..types import PageKey
from .client import error_of
from .sockets import Dialer, MalformedFrames

# Of the time of an offer, what is kept for its answer: as much, but at most that share of it.
_ANSWER_S = 0.5
_ANSWER_SHARE = 0.25
_POLL_S = 60.0
_REQUEST_ID = 1


class Offers(Enum):
    REFUSED = "refused"
    TAKEN = "taken"


def offer(
    receiver: str, *, peer_id: str, peer_address: str, keys: Sequence[PageKey], deadline_s: float
) -> FetchReply:
    """Have the rank whose ``peer`` socket is ``receiver`` fetch ``keys`` (a whole prefix) from the
    one at ``peer_address``. Blocks the calling thread for at most ``deadline_s``; the fetch has all
    of it but a quarter, half a second at most, that is left for its answer.

    Raises ProtocolError for keys or a deadline that make no sense, PeerUnreachable without an
    answer, else what the receiver answered; a fetch that could not be completed is a reply whose
    outcome says why.
    """
    if not 0 <= deadline_s < math.inf:
        raise ProtocolError(f"offer: deadline {deadline_s}")
    fetch_s = deadline_s - min(_ANSWER_S, _ANSWER_SHARE * deadline_s)
    request = as_received(OfferRequest(peer_id, peer_address, list(keys), fetch_s))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    give_up_s = time.monotonic() + deadline_s
    try:
        dialer = Dialer(context, receiver)
        dialer.send(_REQUEST_ID, request)
        while (left_s := give_up_s - time.monotonic()) > 0:
            if not dialer.socket.poll(int(min(left_s, _POLL_S) * 1000) + 1):
                continue
            for answer in dialer.receive(1):
                if isinstance(answer, MalformedFrames):
                    raise ProtocolError(str(answer))
                reply = answer[1]
                if isinstance(reply, ErrorReply):
                    raise error_of(reply)
                if not isinstance(reply, FetchReply):
                    raise ProtocolError(f"an offer was answered by {type(reply).__name__}")
                return reply
        raise PeerUnreachable(f"{receiver} did not answer an offer in {deadline_s:g} s")
    finally:
        context.destroy(0)
