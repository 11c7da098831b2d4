"""One swap of a prefix between HBM and DRAM: what is taken, what is copied, how it ends.

``start_*`` take what the swap needs (locks in the tree, leases, device slots) and hand the copies
over; then exactly one of ``apply`` (all landed, on every rank) and ``undo`` gives everything back.

swap_out   every page that is to leave is copied to DRAM if it is not there, while its node is
           locked. Then the nodes are evicted, leaf first. Pages that extend the prefix leave with
           it, as they could not be used without it. Pages that another prefix shares stay, and so
           does what a request uses.
swap_in    pages are read into fresh device slots that nobody sees, and join the tree as if a
           request had computed them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..errors import LimitExceeded
from ..memory.swap import DevicePool
from ..mempool import MemPool, PoolLease
from ..types import PageKey
from .agreement import Agreement
from .copies import Copy, CopyThread, FillJob, StoreJob
from .device_tree import DeviceTree, Hold, Prefix, Span, leading
from .engine_messages import Outcome
from .scheduler_clock import SchedulerClock

# A swap-in may take this part of the slots that are free or evictable.
SLOTS_SHARE = 2
# A lease must outlive the copy it protects, which may begin just before the deadline.
LEASE_GRACE_S = 60.0


class Linked(Protocol):
    """What ``Ports`` takes from the linker."""

    def device_events(self) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """What the verbs act on."""

    tree: DeviceTree
    pool: MemPool
    device: DevicePool
    copies: CopyThread
    ranks: Agreement
    clock: SchedulerClock
    linked: Linked

    def page_ids(self, slots: torch.Tensor) -> torch.Tensor:
        page_size = self.tree.page_size
        return (slots[::page_size] // page_size).cpu()


class Swap(Protocol):
    @property
    def copies(self) -> list[Copy]: ...

    @property
    def not_landed(self) -> Outcome:
        """What it means that a copy in time did not land."""
        ...

    @property
    def moved_pages(self) -> int: ...

    @property
    def stored_pages(self) -> int: ...

    @property
    def continued_pages(self) -> int: ...

    def apply(self) -> Outcome: ...

    def undo(self) -> None: ...


Started = Swap | Outcome


# -- HBM to DRAM --


@dataclass(slots=True)
class SwapOut:
    """``leaving``: spans in the order of their paths, parents before children. ``kept``: why the
    head of the prefix stays."""

    ports: Ports
    prefix: Prefix
    leaving: list[Span]
    holds: list[Hold]
    kept: Outcome
    copies: list[Copy] = field(default_factory=list)
    moved_pages: int = 0
    stored_pages: int = 0
    continued_pages: int = 0
    not_landed: Outcome = Outcome.NO_BLOCKS
    _storing_pages: int = 0

    def store(self, limit_s: float) -> None:
        """Copy what DRAM lacks."""
        ports, tree = self.ports, self.ports.tree
        for span in self.leaving:
            keys = tree.keys_of(span)
            store = ports.pool.prepare_store(keys, parent=tree.parent_key(span))
            if not store.missing:
                store.commit()
                held = ports.pool.readable_pages(keys) == len(keys)
                self.copies.append(Copy.nothing(landed=held))
                continue
            self._storing_pages += len(store.missing)
            pages = ports.page_ids(tree.slots(span))
            wanted = pages[torch.tensor([position for position, _ in store.missing])]
            ready = ports.linked.device_events()
            job = StoreJob(ports.pool, ports.device, keys, store, wanted, ready)
            self.copies.append(ports.copies.submit(job, limit_s))

    def apply(self) -> Outcome:
        self.undo()
        self.stored_pages = self._storing_pages
        tree, pages = self.ports.tree, len(self.prefix.keys)
        gone = [span for span in reversed(self.leaving) if tree.evict(span.node)]
        self.moved_pages = leading(gone, pages, tree.page_size)
        total = sum(span.end - span.start for span in gone) // tree.page_size
        self.continued_pages = total - self.moved_pages
        if len(gone) < len(self.leaving):
            return Outcome.IN_USE
        return self.kept

    def undo(self) -> None:
        for hold in self.holds:
            self.ports.tree.release(hold)
        self.holds.clear()


def start_swap_out(ports: Ports, prefix: Prefix, deadline_s: float) -> Started:
    """COMPLETE when nothing of it is in HBM, IN_USE or SHARED when nothing of it may leave."""
    hold = ports.tree.hold(prefix)
    if hold is None:
        return Outcome.COMPLETE
    path = ports.tree.path(hold.node)
    leaving, kept = _leaving(path, hold)
    if not leaving:
        ports.tree.release(hold)
        return kept
    swap = SwapOut(ports, prefix, leaving, [hold], kept)
    try:
        if path[-1].children:
            for chain in ports.tree.below(hold.node):
                known = {span.node for span in swap.leaving}
                swap.leaving.extend(span for span in chain if span.node not in known)
                swap.holds.append(ports.tree.hold_node(chain[-1].node))
        swap.store(deadline_s)
    except BaseException:
        swap.undo()
        raise
    return swap


def _leaving(path: list[Span], hold: Hold) -> tuple[list[Span], Outcome]:
    """The end of ``path`` that nobody else needs, and why the rest stays."""
    leaving: list[Span] = []
    for span in reversed(path):
        if span.end > hold.tokens or span.start < hold.tokens - hold.free_tokens:
            return leaving[::-1], Outcome.IN_USE
        if span.node != hold.node and span.children > 1:
            return leaving[::-1], Outcome.SHARED
        leaving.append(span)
    return leaving[::-1], Outcome.COMPLETE


# -- DRAM to HBM --


@dataclass(slots=True)
class SwapIn:
    """``slots`` belong to this swap alone until they are in the tree. ``short``: why not all that
    DRAM holds is loaded."""

    ports: Ports
    prefix: Prefix
    hold: Hold | None
    slots: torch.Tensor
    short: Outcome
    copies: list[Copy] = field(default_factory=list)
    moved_pages: int = 0
    stored_pages: int = 0
    continued_pages: int = 0
    not_landed: Outcome = Outcome.COPY_FAILED

    def apply(self) -> Outcome:
        self.ports.tree.insert(self.prefix, self.hold, self.slots)
        self.moved_pages = len(self.slots) // self.ports.tree.page_size
        self._release()
        return self.short

    def undo(self) -> None:
        self.ports.tree.free(self.slots)
        self._release()

    def _release(self) -> None:
        if self.hold is not None:
            self.ports.tree.release(self.hold)
            self.hold = None


def start_swap_in(ports: Ports, prefix: Prefix, deadline_s: float) -> Started:
    """COMPLETE when all of it is in HBM, MISS when DRAM does not hold what comes next, NO_SLOTS
    when the device pool has no room, LIMIT_EXCEEDED when the pool leases no more."""
    tree = ports.tree
    hold = tree.hold(prefix)
    known = hold.tokens // tree.page_size if hold is not None else 0
    lease = _lease(ports.pool, prefix.keys[known:], deadline_s + LEASE_GRACE_S)
    # One rank's refusal is everybody's: ranks that did not do the same would wait for each other.
    (found,) = ports.ranks.least([len(lease.blocks) if lease is not None else -1])
    pages = min(found, tree.room() // SLOTS_SHARE // tree.page_size)
    slots = tree.allocate(pages * tree.page_size) if pages > 0 else None
    if lease is None or found < 0:
        outcome = Outcome.LIMIT_EXCEEDED
    elif pages < found or (pages and slots is None):
        outcome = Outcome.NO_SLOTS
    else:
        outcome = Outcome.COMPLETE if known + found == len(prefix.keys) else Outcome.MISS
    if slots is None or lease is None:
        _let_go(tree, hold, lease)
        return outcome
    ready = ports.linked.device_events()
    blocks = list(lease.blocks[:pages])
    job = FillJob(ports.pool, ports.device, blocks, ports.page_ids(slots), lease, ready)
    return SwapIn(ports, prefix, hold, slots, outcome, [ports.copies.submit(job, deadline_s)])


def _lease(pool: MemPool, keys: Sequence[PageKey], ttl_s: float) -> PoolLease | None:
    try:
        return pool.acquire(keys, owner="swap_in", ttl_s=ttl_s)
    except LimitExceeded:
        return None


def _let_go(tree: DeviceTree, hold: Hold | None, lease: PoolLease | None) -> None:
    if lease is not None:
        lease.release()
    if hold is not None:
        tree.release(hold)
