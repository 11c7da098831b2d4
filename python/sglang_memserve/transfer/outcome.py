"""Why a fetch, or a source's part of it, ended."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Outcome(Enum):
    """The values are ``FetchReply.outcome`` and ``SourceReply.outcome``."""

    COMPLETE = "complete"
    MISS = "miss"  # the peer does not hold the rest, or not in time
    NO_BLOCKS = "no_blocks"  # our arena is full of pinned blocks, or lost pages meanwhile
    DEADLINE = "deadline"
    PEER_UNREACHABLE = "peer_unreachable"
    NAMESPACE_MISMATCH = "namespace_mismatch"
    VERSION_MISMATCH = "version_mismatch"
    LEASE_INVALID = "lease_invalid"  # the peer restarted, or we read slower than the lease lasted
    TRANSFER_FAILED = "transfer_failed"
    CHECKSUM_MISMATCH = "checksum_mismatch"  # what arrived is not what the peer stored
    LIMIT = "limit_exceeded"  # the peer refused: one of its bounds was reached
    PROTOCOL_ERROR = "protocol_error"
    CLOSED = "closed"  # this rank is shutting down


class Ending(NamedTuple):
    """``detail`` is for people: the values of both sides, where there are such."""

    outcome: Outcome
    detail: str = ""


_OUTCOME_OF_ERROR = {
    "NamespaceMismatch": Outcome.NAMESPACE_MISMATCH,
    "VersionMismatch": Outcome.VERSION_MISMATCH,
    "LeaseInvalid": Outcome.LEASE_INVALID,
    "LimitExceeded": Outcome.LIMIT,
    "PeerUnreachable": Outcome.PEER_UNREACHABLE,
    "TransferFailed": Outcome.TRANSFER_FAILED,
}


def outcome_of(error_kind: str) -> Outcome:
    """``error_kind`` is the name of a class in ``errors``."""
    return _OUTCOME_OF_ERROR.get(error_kind, Outcome.PROTOCOL_ERROR)


def ending_of(error: Exception) -> Ending:
    return Ending(outcome_of(type(error).__name__), str(error))
