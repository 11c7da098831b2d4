"""Transport inside one process: copies between regions that transports have registered."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TransferFailed
from .base import ReadState
from .plan import Segments
from .regions import Regions, segments_within

_MERGE_BYTES = 1 << 20

_lock = threading.Lock()
_open: dict[str, LoopbackTransport] = {}


@dataclass(slots=True)
class _Read:
    peer: str
    parts: Segments
    done: int = 0


class LoopbackTransport:
    """``name`` is unique in the process. A poll copies ``segments_per_poll`` segments.

    The peer's lock is held while its memory is copied, so that ``close`` of the holder means what
    it says even when the reader is another thread.
    """

    def __init__(self, name: str, segments_per_poll: int = 64) -> None:
        self.name = name
        self._per_poll = segments_per_poll
        self._regions = Regions()
        self._reads: dict[int, _Read] = {}
        self._next = 1
        self._peers: set[str] = set()
        self._lock = threading.Lock()
        with _lock:
            if name in _open:
                raise TransferFailed(f"loopback transport {name!r} exists")
            _open[name] = self

    def register(self, base: int, length: int) -> None:
        with self._lock:
            self._regions.add(base, length)

    def unregister(self, base: int, length: int) -> None:
        with self._lock:
            self._regions.remove(base, length)

    def metadata(self) -> bytes:
        return self.name.encode()

    def name_in(self, metadata: bytes) -> str:
        return metadata.decode(errors="replace")

    def connect(self, metadata: bytes) -> str:
        name = self.name_in(metadata)
        self._find(name)
        self._peers.add(name)
        return name

    def disconnect(self, peer: str) -> None:
        self._peers.discard(peer)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        if peer not in self._peers:
            raise TransferFailed(f"not connected to {peer!r}")
        holder = self._find(peer)
        parts = segments_within(
            remote, local, block_bytes, _MERGE_BYTES, holder._regions, self._regions
        )
        handle = self._next
        self._next += 1
        self._reads[handle] = _Read(peer, parts)
        return handle

    def poll(self, handle: int) -> ReadState:
        read = self._reads[handle]
        try:
            holder = self._find(read.peer)
        except TransferFailed:
            del self._reads[handle]
            return ReadState.FAILED
        todo = read.parts[read.done : read.done + self._per_poll]
        with holder._lock:
            for far, near, length in todo.tolist():
                if not holder._regions.covers(far, length):
                    del self._reads[handle]
                    return ReadState.FAILED
                ctypes.memmove(near, far, length)
        read.done += len(todo)
        if read.done < len(read.parts):
            return ReadState.RUNNING
        del self._reads[handle]
        return ReadState.DONE

    def cancel(self, handle: int) -> None:
        read = self._reads.get(handle)
        if read is not None:
            read.peer = ""  # the next poll finds nobody: FAILED

    def close(self) -> None:
        with _lock:
            if _open.get(self.name) is self:
                del _open[self.name]
        with self._lock:
            self._regions.clear()
        self._reads.clear()

    def _find(self, name: str) -> LoopbackTransport:
        with _lock:
            found = _open.get(name)
        if found is None:
            raise TransferFailed(f"no loopback transport {name!r}")
        return found
