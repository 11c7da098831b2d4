"""Residency events and the snapshot, in SGLang's KV-event format.

The stream of a rank is a ZMQ PUB socket of three frames: topic, sequence number (8 bytes, big
endian), and a msgpack ``EventBatch``. Struct and field names are SGLang's (``sglang.srt.
disaggregation.kv_events``), so every tool that reads SGLang's stream reads this one.

Sequence numbers of one generation start at 0 and have no holes. A subscriber that sees a hole, a
smaller number or a new generation takes the snapshot: the same events, replayed, that lead from an
empty cache to the state after sequence number ``seq``. Batches numbered ``seq`` or less are then
stale and must be ignored.
"""

from __future__ import annotations

import msgspec

from ..errors import ProtocolError
from . import UNDECODABLE

TOPIC = b"memserve-kv"


class _Event(msgspec.Struct, frozen=True, omit_defaults=True, tag=True, gc=False):
    pass


class BlockStored(_Event, frozen=True):
    """Pages became readable. ``block_hashes`` form a chain that hangs under ``parent_block_hash``.

    ``token_ids`` is always empty here: MemPool knows keys, never text.
    ``medium`` is a ``types.Tier`` value.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None


class BlockRemoved(_Event, frozen=True):
    """Pages are no longer readable in ``medium``."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(_Event, frozen=True):
    """Nothing is readable any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``ts`` is seconds since the epoch at the sender."""

    ts: float
    events: list[Event]
    attn_dp_rank: int | None = None


class Snapshot(msgspec.Struct, frozen=True):
    """All that a rank holds, as the events that rebuild it, true right after batch ``seq``.

    ``seq`` is -1 when no batch was published yet.
    """

    generation: str
    seq: int
    events: list[Event]


_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(EventBatch)
_snapshot_decoder = msgspec.msgpack.Decoder(Snapshot)


def encode_frames(seq: int, batch: EventBatch) -> list[bytes]:
    return [TOPIC, seq.to_bytes(8, "big"), _encoder.encode(batch)]


def decode_frames(frames: list[bytes]) -> tuple[int, EventBatch]:
    """Sequence number and batch of one message; raises ProtocolError for anything else."""
    if len(frames) != 3 or frames[0] != TOPIC or len(frames[1]) != 8:
        raise ProtocolError(f"not a KV event message: {len(frames)} frames")
    try:
        return int.from_bytes(frames[1], "big"), _batch_decoder.decode(frames[2])
    except UNDECODABLE as error:
        raise ProtocolError(f"KV event batch: {error}") from error


def encode_snapshot(snapshot: Snapshot) -> bytes:
    return _encoder.encode(snapshot)


def decode_snapshot(data: bytes) -> Snapshot:
    """Raises ProtocolError for bytes that are not a snapshot."""
    try:
        return _snapshot_decoder.decode(data)
    except UNDECODABLE as error:
        raise ProtocolError(f"KV snapshot: {error}") from error
