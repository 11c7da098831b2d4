"""MemServe for SGLang: one KV-cache pool over all instances.

Modules, lowest first (imports only ever point down this list):

``types, errors``      the shared nouns and the exception tree
``config``             settings, parsed once at the edge
``hashing``            page keys, equal to SGLang's
``protocol/``          what instances and routers say to each other
``index/``             which block holds which prefix
``memory/``            where blocks lie and how pages are copied
``transfer/``          how blocks move between instances
``pool/``              one rank's blocks: their states, and changes of size
``mempool``            the paper's verbs over pool, index, memory and transfer
``plugin/``            the only folder that touches SGLang
``launch_*, demo*``    entries
``router/``            the global tree and the routing decision; never imports torch

What a program of one's own needs can be imported from here; a name loads its module when it is
first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hashing import page_keys
    from .mempool import MemPool
    from .protocol.control import FetchRequest
    from .transfer.agent import RankAgent
    from .transfer.nixl import NixlTransport
    from .types import Namespace

__all__ = ["FetchRequest", "MemPool", "Namespace", "NixlTransport", "RankAgent", "page_keys"]
__version__ = "0.1.0"

_HOMES = {
    "FetchRequest": "protocol.control",
    "MemPool": "mempool",
    "Namespace": "types",
    "NixlTransport": "transfer.nixl",
    "RankAgent": "transfer.agent",
    "page_keys": "hashing",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
