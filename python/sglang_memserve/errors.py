"""Every exception MemServe raises on purpose.

MemServeError
├── ConfigError            the operator or a caller asked for something impossible
├── ProtocolError          bytes or a message that do not follow the protocol
│   └── VersionMismatch    the peer speaks another protocol version
├── NamespaceMismatch      the peer's pages are not interchangeable with ours
├── OutOfBlocks            the arena cannot give as many blocks as asked
├── PeerError              a peer refused or failed
│   ├── PeerUnreachable    no answer before the deadline
│   ├── LeaseInvalid       the lease expired, is unknown or is of another generation
│   └── TransferFailed     the bytes did not arrive
├── CopyStalled            a copy between HBM and DRAM does not end
├── DeviceError            the accelerator or its driver refused something
├── NoInstance             no instance can serve a request; says why each cannot
├── ShuttingDown           it ends, and takes nothing new
└── LimitExceeded          a configured bound was reached

Expected outcomes (a miss, a partial match, nothing to fetch) are return values, not exceptions.
Our own bugs are ``assert`` statements with the values in them.
"""

from __future__ import annotations

from collections.abc import Mapping


class MemServeError(Exception):
    """Base of all of them; ``str()`` is one line fit for an operator."""


class ConfigError(MemServeError):
    pass


class ProtocolError(MemServeError):
    pass


class VersionMismatch(ProtocolError):
    pass


class NamespaceMismatch(MemServeError):
    pass


class OutOfBlocks(MemServeError):
    pass


class PeerError(MemServeError):
    pass


class PeerUnreachable(PeerError):
    pass


class LeaseInvalid(PeerError):
    pass


class TransferFailed(PeerError):
    pass


class CopyStalled(MemServeError):
    pass


class DeviceError(MemServeError):
    pass


class NoInstance(MemServeError):
    """``reasons``: why each instance, by its URL, cannot serve."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        listed = "; ".join(f"{url}: {reason}" for url, reason in self.reasons.items())
        super().__init__(f"no instance can serve this request ({listed or 'none is known'})")

    def including(self, reasons: Mapping[str, str]) -> NoInstance:
        """The same error with the reasons of more instances."""
        return NoInstance({**self.reasons, **reasons})


class ShuttingDown(MemServeError):
    pass


class LimitExceeded(MemServeError):
    pass
