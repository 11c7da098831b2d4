"""Every decoder, fed with any bytes and with damaged messages: accepted, or the one protocol error.

What a decoder accepts encodes again to something that decodes to the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_memserve.errors import ProtocolError, TransferFailed
from sglang_memserve.protocol import control, events, http
from sglang_memserve.transfer.regions import Regions, describe, understand
from sglang_memserve.types import Namespace

NAMESPACE = Namespace("m", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
KEY = bytes(range(32))
SOURCE = control.Source("http://a", "tcp://127.0.0.1:5", 3, 4)
CONTROL: list[control.Message] = [
    control.Hello(1, "http://a", "g", NAMESPACE),
    control.HelloReply(1, "http://a", "g", NAMESPACE, b"\0m\xff", [(4096, 8192)]),
    control.LeaseRequest("g", [KEY, KEY], 1, 0.5, 3.0),
    control.LeaseReply(2**63 - 1, [0, 2**64 - 1], [1, 2**64 - 1]),
    control.ReleaseRequest("g", 5),
    control.ReleaseReply(True),
    control.FetchRequest([SOURCE, SOURCE], [KEY], 0.0, 5.0, hold_s=9.5),
    control.FetchReply(1, 2, 3, 4, 0.5, "miss", [control.SourceReply("a", 3, "miss", "why")]),
    control.SnapshotRequest(),
    control.SnapshotReply(b"\x93"),
    control.StatsReply({"x": 1.0}),
    control.InfoReply(0, "g", NAMESPACE, "tcp://a:1", "tcp://a:2", 7),
    control.ErrorReply("LeaseInvalid", "gone"),
]
EVENTS: list[events.Event] = [
    events.BlockStored([1, -(2**63)], None, [], 16, medium="CPU_PINNED"),
    events.BlockRemoved([2], medium="GPU"),
    events.AllBlocksCleared(),
]
REGIONS = Regions([(4096, 8192, 1), (65536, 4096, 2)])


def decode_frames(data: bytes) -> tuple[int, events.EventBatch]:
    return events.decode_frames([events.TOPIC, bytes(8), data])


@dataclass(frozen=True)
class Codec:
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    examples: list[bytes]
    error: type[Exception] = ProtocolError


BODIES: dict[type[msgspec.Struct], list[bytes]] = {
    http.FetchBody: [
        b'{"keys":["00"],"source":"u"}',
        b'{"keys":[],"sources":[{"url":"u","first_page":3}]}',
    ],
    http.PoolBody: [b'{"dram":"3GiB"}', b'{"dram_bytes":5,"wait_s":0.5}'],
    http.PrefixBody: [b'{"text":"a"}', b'{"input_ids":[1,2]}'],
    http.PeersBody: [b'{"peers":[],"valid_s":9}'],
}

CODECS = {
    "control": Codec(control.decode, control.encode, [control.encode(m) for m in CONTROL]),
    "events": Codec(
        decode_frames,
        lambda found: events.encode_frames(*found)[2],
        [events.encode_frames(0, events.EventBatch(1.0, EVENTS))[2]],
    ),
    "snapshot": Codec(
        events.decode_snapshot,
        events.encode_snapshot,
        [events.encode_snapshot(events.Snapshot("g", 5, EVENTS))],
    ),
    "regions": Codec(
        understand,
        lambda found: describe(found[0].name, found[1], found[0].library),
        [describe("agent", REGIONS, b"\0nixl\xff")],
        TransferFailed,
    ),
    **{
        kind.__name__: Codec(
            functools.partial(http.decode, kind=kind, what="body"), msgspec.json.encode, examples
        )
        for kind, examples in BODIES.items()
    },
}


def accepts(codec: Codec, data: bytes) -> bool:
    try:
        found = codec.decode(data)
    except codec.error:
        return False
    again = codec.encode(found)
    # Compared as bytes: NaN is not equal to itself.
    assert codec.encode(codec.decode(again)) == again
    return True


@pytest.mark.parametrize("name", CODECS)
def test_what_is_valid_is_accepted(name: str) -> None:
    assert all(accepts(CODECS[name], example) for example in CODECS[name].examples)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes(name: str, data: bytes) -> None:
    accepts(CODECS[name], data)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_messages(name: str, data: st.DataObject) -> None:
    """Bytes replaced, runs cut out, runs doubled, the end missing."""
    raw = bytearray(data.draw(st.sampled_from(CODECS[name].examples)))
    for _ in range(data.draw(st.integers(1, 5))):
        if not raw:
            break
        place = data.draw(st.integers(0, len(raw) - 1))
        stop = min(len(raw), place + data.draw(st.integers(1, 8)))
        match data.draw(st.sampled_from(["replace", "remove", "double", "insert", "end"])):
            case "replace":
                raw[place] = data.draw(st.integers(0, 255))
            case "remove":
                del raw[place:stop]
            case "double":
                raw[place:place] = raw[place:stop]
            case "insert":
                raw[place:place] = data.draw(st.binary(min_size=1, max_size=9))
            case _:
                del raw[place:]
    accepts(CODECS[name], bytes(raw))


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_other_values_in_the_right_shape(name: str, data: st.DataObject) -> None:
    """A valid message whose fields hold something else: of another type, size or sign."""
    codec = CODECS[name]
    module = msgspec.json if name in {kind.__name__ for kind in BODIES} else msgspec.msgpack
    value = module.decode(data.draw(st.sampled_from(codec.examples)))
    other = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.integers(-5, 5), max_size=3),
    )
    fields = list(value) if isinstance(value, dict) else list(range(len(value)))
    changed = data.draw(st.sampled_from(fields))
    value[changed] = data.draw(other)
    try:
        encoded = module.encode(value)
    except (msgspec.MsgspecError, ValueError):
        return
    accepts(codec, encoded)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("levels", [30, 3_000, 300_000])
def test_deep_nesting(name: str, levels: int) -> None:
    """In place of each byte of a message, where a value may begin."""
    codec = CODECS[name]
    opened = b"[" if name in {kind.__name__ for kind in BODIES} else b"\x91"
    for example in codec.examples:
        unknown_field = _with_field(example, opened * levels)
        cut = range(0, len(example), 1 if levels < 100 else 1 + len(example) // 12)
        for data in (unknown_field, *(example[:end] + opened * levels for end in cut)):
            accepts(codec, data)


def _with_field(example: bytes, value: bytes) -> bytes:
    """Decoders skip fields that they do not know, and have to walk through them for that."""
    if example[:1] == b"{":
        return b'{"unknown":' + value
    # A map or an array of up to 15 has its length in the low half of the first byte.
    if example[0] & 0xF0 == 0x80:
        return bytes([example[0] + 1]) + example[1:] + b"\xa1x" + value
    return bytes([example[0] + 1]) + example[1:] + value


@given(st.lists(st.binary(max_size=12), max_size=5))
def test_any_frames(frames: list[bytes]) -> None:
    try:
        events.decode_frames(frames)
    except ProtocolError:
        return
