"""Transport over NIXL 1.5 (``nixl._api``), UCX backend.

What was measured, and shapes this file:

- NIXL's progress thread spins on a whole core as the Python API starts it (``pthrDelay`` = 0).
  Without one, a peer on the same machine never finishes its first read from us. With a delay of
  tens of milliseconds the thread sleeps in ``poll`` on UCX's event descriptors, wakes when there is
  work, costs well under one percent of a core when idle, and reads are as fast. The delay can only
  be set on the bindings, so the agent is made there and not by ``nixl_agent``.
- Between processes of one machine UCX copies inside the submission (cross-memory attach), so a
  submission lasts as long as its bytes take. A read is therefore cut into batches, one or a few
  submitted a poll, and the calling thread stays responsive.
- A peer's metadata can be loaded again to learn of memory that it has registered since, also while
  reads run. Registrations that are gone stay known until the peer is removed, which does no harm
  unless the same memory was registered anew: then the peer is removed first, when no read runs.
- A descriptor must lie within one registration on either side.
- A read cannot be cancelled. After releasing a running request, or removing its agent, NIXL
  forgets it but its bytes still land. So a read is only ever waited for: ``cancel`` submits nothing
  more, and a peer is removed when its reads have ended.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import TransferFailed
from .base import ReadState
from .plan import Segments, batches
from .regions import Description, Regions, describe, segments_within, understand

log = logging.getLogger(__name__)

_BATCH_BYTES = 16 << 20
_BATCHES_IN_FLIGHT = 4
_PROGRESS_DELAY_US = 25_000

# Read by NIXL and UCX when they start. UCX would log to standard output, which belongs to the
# server, and both report every lost peer, which we report ourselves.
_QUIET = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal", "UCX_LOG_FILE": "stderr"}


@dataclass(slots=True)
class _Read:
    peer: str
    todo: deque[Segments]
    running: list[int] = field(default_factory=list)
    failed: bool = False


@dataclass(frozen=True, slots=True)
class _Peer:
    """``regions``: what it has registered; ``seen``: what NIXL believes it has."""

    metadata: bytes
    regions: Regions
    seen: Regions


class NixlTransport:
    """``name`` must differ from every other agent's, of earlier boots too.

    Nothing is loaded or started before ``register``, so the object may be made on another thread
    than the one that uses it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._nixl: RawNixl | None = None
        self._reads: dict[int, _Read] = {}
        self._next = 1
        self._regions = Regions()
        self._peers: dict[str, _Peer] = {}
        self._leaving: set[str] = set()

    def register(self, base: int, length: int) -> None:
        if self._nixl is None:
            self._nixl = RawNixl(self.name)
        self._regions.add(base, length)
        try:
            self._nixl.register(base, length)
        except TransferFailed:
            self._regions.remove(base, length)
            raise

    def unregister(self, base: int, length: int) -> None:
        nixl = self._open()
        self._regions.remove(base, length)
        nixl.unregister(base, length)

    def metadata(self) -> bytes:
        return describe(self.name, self._regions, self._open().metadata())

    def name_in(self, metadata: bytes) -> str:
        return understand(metadata)[0].name

    def connect(self, metadata: bytes) -> str:
        described, regions = understand(metadata)
        known = self._peers.get(described.name)
        changed = known is not None and known.metadata != metadata
        if known is not None and changed and not regions.replaces_any(known.seen):
            self._add(described)
            seen = Regions({*known.seen, *regions})
            self._peers[described.name] = _Peer(metadata, regions, seen)
            self._leaving.discard(described.name)
            return described.name
        if known is not None:
            if self._has_reads(described.name):
                raise TransferFailed(f"earlier reads from {described.name} have not ended")
            self._remove(described.name)
        self._add(described)
        self._peers[described.name] = _Peer(metadata, regions, regions)
        return described.name

    def _add(self, described: Description) -> None:
        name = self._open().add_peer(described.library)
        if name != described.name:
            if name not in self._peers:
                self._open().remove_peer(name)
            raise TransferFailed(f"metadata of {name!r} came under the name {described.name!r}")

    def disconnect(self, peer: str) -> None:
        if self._has_reads(peer):
            self._leaving.add(peer)
        else:
            self._remove(peer)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        known = self._peers.get(peer)
        if known is None or peer in self._leaving:
            raise TransferFailed(f"not connected to {peer}")
        parts = segments_within(
            remote, local, block_bytes, _BATCH_BYTES, known.regions, self._regions
        )
        read = _Read(peer, deque(batches(parts, _BATCH_BYTES)))
        self._submit(read)
        if read.failed and not read.running:
            raise TransferFailed(f"NIXL refused a read from {peer}")
        handle = self._next
        self._next += 1
        self._reads[handle] = read
        return handle

    def poll(self, handle: int) -> ReadState:
        read = self._reads[handle]
        nixl = self._open()
        still: list[int] = []
        for request in read.running:
            state = nixl.state(request)
            if state is ReadState.RUNNING:
                still.append(request)
            elif state is ReadState.FAILED:
                read.failed = True
        read.running = still
        done = not self._submit(read)
        if read.running or not (done or read.failed):
            return ReadState.RUNNING
        del self._reads[handle]
        if read.peer in self._leaving and not self._has_reads(read.peer):
            self._remove(read.peer)
        return ReadState.FAILED if read.failed else ReadState.DONE

    def cancel(self, handle: int) -> None:
        read = self._reads.get(handle)
        if read is not None:
            read.failed = True

    def close(self) -> None:
        if self._nixl is None:
            return
        for read in self._reads.values():
            for request in read.running:
                self._nixl.drop(request)
        self._reads.clear()
        self._peers.clear()
        self._regions.clear()
        self._nixl.close()
        self._nixl = None

    def _submit(self, read: _Read) -> bool:
        """Submit until enough is in flight, or one batch was copied on the spot.

        Returns whether there may be more to submit.
        """
        nixl = self._open()
        while not read.failed and len(read.running) < _BATCHES_IN_FLIGHT:
            if not read.todo:
                return False
            try:
                request = nixl.submit(read.peer, read.todo.popleft())
            except TransferFailed as error:
                log.info("read from %s failed: %s", read.peer, error)
                read.failed = True
                return False
            if request is None:
                return bool(read.todo)
            read.running.append(request)
        return True

    def _open(self) -> RawNixl:
        assert self._nixl is not None, f"transport {self.name} has no registered memory"
        return self._nixl

    def _has_reads(self, peer: str) -> bool:
        return any(read.peer == peer for read in self._reads.values())

    def _remove(self, peer: str) -> None:
        self._leaving.discard(peer)
        if self._peers.pop(peer, None) is not None:
            self._open().remove_peer(peer)


class RawNixl:
    """The calls of NIXL's bindings that are used, with its errors turned into TransferFailed."""

    def __init__(self, name: str) -> None:
        self._api = api = _load()
        self._errors = tuple(
            error
            for key, error in vars(api).items()
            if key.endswith("Error") and isinstance(error, type) and issubclass(error, Exception)
        )
        config = api.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS_DELAY_US
        try:
            self._agent = api.nixlAgent(name, config)
            self._agent.createBackend("UCX", {})
        except self._errors as error:
            raise TransferFailed(f"NIXL with UCX does not start: {_explain(error)}") from error

    def register(self, base: int, length: int) -> None:
        api = self._api
        try:
            self._agent.registerMem(api.nixlRegDList(api.DRAM_SEG, [(base, length, 0, "")]), [])
        except self._errors as error:
            text = f"NIXL cannot register {length} bytes: {_explain(error)}"
            raise TransferFailed(text) from error

    def unregister(self, base: int, length: int) -> None:
        api = self._api
        try:
            self._agent.deregisterMem(api.nixlRegDList(api.DRAM_SEG, [(base, length, 0, "")]), [])
        except self._errors as error:
            text = f"NIXL cannot unregister {length} bytes: {_explain(error)}"
            raise TransferFailed(text) from error

    def metadata(self) -> bytes:
        return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        try:
            return str(self._agent.loadRemoteMD(metadata), "utf-8", "replace")
        except self._errors as error:
            raise TransferFailed(f"NIXL cannot reach the peer: {_explain(error)}") from error

    def remove_peer(self, peer: str) -> None:
        try:
            self._agent.invalidateRemoteMD(peer)
        except self._errors as error:
            log.debug("NIXL had forgotten %s already: %s", peer, _explain(error))

    def submit(self, peer: str, batch: Segments) -> int | None:
        """Start reading; None when it was done on the spot."""
        api = self._api
        # NIXL's rows: address, bytes, device.
        far, near = np.zeros_like(batch), np.zeros_like(batch)
        far[:, 0], near[:, 0] = batch[:, 0], batch[:, 1]
        far[:, 1] = near[:, 1] = batch[:, 2]
        request: int | None = None
        try:
            request = self._agent.createXferReq(
                api.NIXL_READ,
                api.nixlXferDList(api.DRAM_SEG, near),
                api.nixlXferDList(api.DRAM_SEG, far),
                peer,
                "",
                [],
            )
            status = self._agent.postXferReq(request, "")
        except self._errors as error:
            if request is not None:
                self.drop(request)
            raise TransferFailed(_explain(error)) from error
        if status == api.NIXL_IN_PROG:
            return request
        self.drop(request)
        if status != api.NIXL_SUCCESS:
            raise TransferFailed(f"NIXL status {status}")
        return None

    def state(self, request: int) -> ReadState:
        """DONE and FAILED give the request back."""
        try:
            status = self._agent.getXferStatus(request)
        except self._errors as error:
            log.info("NIXL read failed: %s", _explain(error))
            self.drop(request)
            return ReadState.FAILED
        if status == self._api.NIXL_IN_PROG:
            return ReadState.RUNNING
        self.drop(request)
        return ReadState.DONE if status == self._api.NIXL_SUCCESS else ReadState.FAILED

    def drop(self, request: int) -> None:
        try:
            self._agent.releaseXferReq(request)
        except self._errors as error:
            log.debug("NIXL keeps a request: %s", _explain(error))

    def close(self) -> None:
        # The destructor closes the endpoints and stops the progress thread: no byte lands later.
        self._agent = None


def _load() -> Any:
    """NIXL's bindings, loaded without their side effects on our logging."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    complain = logging.raiseExceptions
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise TransferFailed(f"NIXL is not installed: {error}") from error
    finally:
        logging.raiseExceptions = complain


def _explain(error: BaseException) -> str:
    return str(error) or type(error).__name__
