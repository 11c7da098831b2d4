"""Control messages: what was sent is what arrives, and any other bytes raise one error."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_memserve import errors
from sglang_memserve.errors import MemServeError, NamespaceMismatch, ProtocolError, VersionMismatch
from sglang_memserve.protocol import PROTOCOL_VERSION, handshake
from sglang_memserve.protocol.control import (
    ErrorReply,
    FetchRequest,
    Hello,
    HelloReply,
    InfoRequest,
    LeaseReply,
    LeaseRequest,
    Message,
    ReleaseRequest,
    decode,
    encode,
)
from sglang_memserve.transfer.client import error_of
from sglang_memserve.transfer.outcome import Outcome, outcome_of
from sglang_memserve.types import Namespace

NAMESPACE = Namespace("m", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
KEY = bytes(range(32))
MESSAGES: list[Message] = [
    Hello(1, "http://a", "g", NAMESPACE),
    HelloReply(1, "http://a", "g", NAMESPACE, b"\0metadata\xff"),
    LeaseRequest("g", [KEY, KEY], 1, 0.5, 3.0),
    LeaseReply(2**63 - 1, [0, 2**64 - 1], []),
    ReleaseRequest("g", 5),
    FetchRequest.of("http://a", "tcp://127.0.0.1:5", [KEY], 0.0, 5.0),
    InfoRequest(),
    ErrorReply("LeaseInvalid", "gone"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_bytes_are_a_message_or_one_error(data: bytes) -> None:
    try:
        decode(data)
    except ProtocolError:
        return


@given(st.data())
def test_damaged_messages_are_a_message_or_one_error(data: st.DataObject) -> None:
    raw = bytearray(encode(data.draw(st.sampled_from(MESSAGES))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except ProtocolError:
        return


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_of_another_length_are_refused(size: int) -> None:
    for message in (
        LeaseRequest("g", [KEY, bytes(size)], 1, 0.0, 1.0),
        FetchRequest.of("p", "tcp://a:1", [bytes(size)], 0.0, 1.0),
    ):
        with pytest.raises(ProtocolError, match=f"{size} bytes"):
            decode(encode(message))


@pytest.mark.parametrize(
    "memory", [[(-1, 5)], [(0, 0)], [(4096, -4096)], [(4096, 4096), (2**64 - 1, 2)]]
)
def test_memory_that_cannot_be_is_refused(memory: list[tuple[int, int]]) -> None:
    with pytest.raises(ProtocolError, match="no memory is"):
        decode(encode(HelloReply(1, "http://a", "g", NAMESPACE, b"", memory)))


def test_the_handshake_names_what_differs() -> None:
    other = Namespace("m", "2", "float16", 16, 30, 3, 64, 64, 0, 1)
    handshake.require_same_namespace(NAMESPACE, NAMESPACE, "a", "b")
    with pytest.raises(NamespaceMismatch, match=r"weight_version: a has '1', b has '2'; kv_dtype"):
        handshake.require_same_namespace(NAMESPACE, other, "a", "b")
    assert handshake.layout_hash(NAMESPACE) != handshake.layout_hash(other)
    handshake.require_same_version(PROTOCOL_VERSION)
    with pytest.raises(VersionMismatch):
        handshake.require_same_version(PROTOCOL_VERSION + 1)


def test_every_error_crosses_the_wire_by_its_name() -> None:
    for kind in (
        errors.ProtocolError,
        errors.VersionMismatch,
        errors.NamespaceMismatch,
        errors.OutOfBlocks,
        errors.PeerUnreachable,
        errors.LeaseInvalid,
        errors.TransferFailed,
        errors.LimitExceeded,
    ):
        error = error_of(ErrorReply(kind.__name__, "why"))
        assert type(error) is kind and str(error) == "why"
        assert isinstance(outcome_of(kind.__name__), Outcome)
    for name in ("KeyboardInterrupt", "annotations", "__doc__", ""):
        assert type(error_of(ErrorReply(name, "why"))) is MemServeError


def test_a_message_of_another_version_with_more_fields_is_understood() -> None:
    wider = msgspec.msgpack.decode(encode(ReleaseRequest("g", 5)))
    wider["new_field"] = 1
    assert decode(msgspec.msgpack.encode(wider)) == ReleaseRequest("g", 5)
