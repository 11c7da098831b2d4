"""The merged radix tree: which instance holds which page of which prefix, in which tier.

Theory of operation
-------------------
A page key is the hash of a whole prefix, so it can have one parent only, and where it stands in the
tree never depends on who holds it. The tree is therefore two flat maps and a set of runs:

    _where      page key  ->  the node whose run contains it
    _children   page key  ->  the nodes whose run starts right below that page

A **node** is a run of consecutive pages with equal holders: path compression. Two neighbours are
one node exactly when the lower one is the only child of the upper one and the same instances hold
both in the same tiers. So every branch and every change of holders is a node boundary:

    [ system prompt      ][ question 1 ]          a, b: HBM      a: HBM
            |
            +-------------[ question 2      ]     b: HBM + DRAM

``match`` needs no tree at all: it goes through the prompt's keys, takes the node of the next key
and compares a whole run at a time, which is one list comparison in C. It costs a few Python
operations a node, not a page.

A parent is recorded by its key, whether or not anybody holds it: ``_children`` has entries for
absent pages. A chain whose parent is unknown thus waits under it, and is joined when the parent
comes (back). What an instance holds below a page that it has lost stays recorded, and ``match``
does not reach it for that instance until the page is back. When two events name different parents
for a key (a collision of the 64-bit keys, or a faulty sender), the first one recorded stays;
``match`` is not affected, since it trusts the order of the keys it is asked for.

Events are the only writer. ``dump`` gives the events that rebuild what an instance holds, so
snapshot, resynchronisation and test equality are one mechanism. ``drop`` visits only the nodes of
the instance that leaves.

Plain synchronous code, owned by one event loop; there are no locks because nothing here awaits.

Memory, measured by ``tracemalloc``: about 110 bytes a page in long runs (300 pages a node), about
670 bytes a page when every page is a node of its own. ``max_pages`` bounds the number of pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from sglang_memserve.errors import LimitExceeded, ProtocolError
from sglang_memserve.protocol.events import AllBlocksCleared, BlockStored, Event
from sglang_memserve.types import InstanceId, ShortKey, Tier

from ..values import Match

DEFAULT_MAX_PAGES = 16_000_000

# Tiers as bits: a page's tiers in one instance are one small integer.
BITS = {Tier.HBM: 1, Tier.DRAM: 2}
_HBM, _DRAM = BITS[Tier.HBM], BITS[Tier.DRAM]
_ALL_TIERS = sum(BITS.values())
# SGLang leaves the medium out where there is only the device tier.
MEDIUM_BITS: dict[str | None, int] = {None: _HBM} | {tier.value: BITS[tier] for tier in Tier}

_Holders = Mapping[InstanceId, int]


class _Node:
    """A run of pages. ``holders`` is never changed in place: halves of a split share it."""

    __slots__ = ("holders", "keys", "parent_key")

    def __init__(
        self, keys: list[ShortKey], parent_key: ShortKey | None, holders: _Holders
    ) -> None:
        self.keys = keys
        self.parent_key = parent_key
        self.holders = holders


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node for people and dashboards: ``keys`` of its run, and who holds all of it where."""

    keys: tuple[ShortKey, ...]
    parent_key: ShortKey | None
    holders: dict[InstanceId, frozenset[Tier]]


@dataclass(frozen=True, slots=True)
class TreeStats:
    """``pages`` counts distinct pages; ``held`` the pages of each instance by tier.

    ``ignored_events`` counts events of media we do not know (disk, remote stores). ``rings`` counts
    the times two runs were found to hang below each other, which only a faulty sender brings about;
    what is left of such runs may stay two nodes where one would do.
    """

    nodes: int
    pages: int
    held: dict[InstanceId, dict[Tier, int]]
    ignored_events: int
    rings: int = 0


class GlobalTree:
    """One tree over the pages of all instances. See the module's theory of operation."""

    def __init__(self, max_pages: int = DEFAULT_MAX_PAGES) -> None:
        self._max_pages = max_pages
        self._where: dict[ShortKey, _Node] = {}
        self._children: dict[ShortKey, set[_Node]] = {}
        # Dictionaries as ordered sets: what a tree does must not depend on memory addresses.
        self._held: dict[InstanceId, dict[_Node, None]] = {}
        self._pages: dict[InstanceId, dict[Tier, int]] = {}
        self._block_size: dict[InstanceId, int] = {}
        self._nodes = 0
        self._ignored_events = 0
        self._rings = 0

    # -- the three operations: find, store, remove --

    def match(self, keys: Sequence[ShortKey]) -> dict[InstanceId, Match]:
        """Leading pages of ``keys`` (a prompt's, from page 0) that each instance holds.

        Instances that hold not even the first page are absent. Changes nothing.
        """
        keys = keys if type(keys) is list else list(keys)
        found: dict[InstanceId, Match] = {}
        # Still matching -> its leading pages in HBM, and in DRAM.
        alive: dict[InstanceId, tuple[int, int]] = {}
        done = 0
        for start, end, holders in self._runs(keys):
            if start == 0:
                alive = {instance: (0, 0) for instance in holders}
            elif not alive.keys() <= holders.keys():
                for instance in [i for i in alive if i not in holders]:
                    hbm, dram = alive.pop(instance)
                    found[instance] = Match(start, hbm, start - dram)
            if not alive:
                break
            for instance, (hbm, dram) in alive.items():
                tiers = holders[instance]
                hbm = end if hbm == start and tiers & _HBM else hbm
                dram = end if dram == start and tiers & _DRAM else dram
                alive[instance] = (hbm, dram)
            done = end
        for instance, (hbm, dram) in alive.items():
            found[instance] = Match(done, hbm, done - dram)
        return found

    def apply(self, instance: InstanceId, event: Event) -> None:
        """Make the event's change. Unknown media are counted and ignored.

        Raises ProtocolError for a chain that contains a page twice or hangs below itself, and
        LimitExceeded when the tree is full; the tree is unchanged then.
        """
        if isinstance(event, AllBlocksCleared):
            self._clear(instance)
            return
        bit = MEDIUM_BITS.get(event.medium)
        if bit is None:
            self._ignored_events += 1
        elif isinstance(event, BlockStored):
            self._store(instance, event, bit)
        else:
            self._remove(instance, cast(list[ShortKey], event.block_hashes), bit)

    def drop(self, instance: InstanceId) -> None:
        """Forget an instance and all it holds, in time proportional to what it holds."""
        self._clear(instance)
        self._held.pop(instance, None)
        self._pages.pop(instance, None)
        self._block_size.pop(instance, None)

    def replace(self, instance: InstanceId, events: Iterable[Event]) -> None:
        """Hold what ``events`` (a snapshot) say and nothing else. Raises what ``apply`` raises;
        the instance then holds the part before the event at fault."""
        self._clear(instance)
        for event in events:
            self.apply(instance, event)

    # -- looking at it --

    def dump(self, instance: InstanceId) -> list[Event]:
        """Events that rebuild what the instance holds, parents before children where known."""
        block_size = self._block_size.get(instance, 0)
        events: list[Event] = []
        for node in self._parents_first(instance):
            for tier, bit in BITS.items():
                if node.holders[instance] & bit:
                    events.append(
                        BlockStored(
                            block_hashes=list(node.keys),
                            parent_block_hash=node.parent_key,
                            token_ids=[],
                            block_size=block_size,
                            medium=tier.value,
                        )
                    )
        return events

    def held(self, instance: InstanceId) -> int:
        """Pages that an instance holds, one in two tiers counted twice."""
        return sum(self._pages.get(instance, {}).values())

    def holders(self, key: ShortKey) -> dict[InstanceId, frozenset[Tier]]:
        """Who holds one page, and where."""
        node = self._where.get(key)
        return _tiers(node.holders) if node is not None else {}

    def nodes(self) -> Iterator[NodeView]:
        """Every node, in no particular order. Do not change the tree meanwhile."""
        for key, node in self._where.items():
            if node.keys[0] == key:
                yield NodeView(tuple(node.keys), node.parent_key, _tiers(node.holders))

    def stats(self) -> TreeStats:
        held = {instance: dict(pages) for instance, pages in self._pages.items()}
        return TreeStats(self._nodes, len(self._where), held, self._ignored_events, self._rings)

    # -- store and remove --

    def _store(self, instance: InstanceId, event: BlockStored, bit: int) -> None:
        keys = cast(list[ShortKey], event.block_hashes)
        parent = cast(ShortKey | None, event.parent_block_hash)
        distinct = set(keys)
        if len(distinct) != len(keys):
            raise ProtocolError(f"stored chain of {instance} contains a page twice")
        if parent in distinct:
            raise ProtocolError(f"stored chain of {instance} hangs below itself")
        if len(self._where) + len(keys) > self._max_pages:
            raise LimitExceeded(f"the global tree is full ({self._max_pages} pages)")
        self._block_size[instance] = event.block_size
        self._held.setdefault(instance, {})
        self._pages.setdefault(instance, dict.fromkeys(Tier, 0))
        where = self._where
        at = 0
        while at < len(keys):
            node = where.get(keys[at])
            if node is not None:
                end = at + _forward(node.keys, _index(node.keys, keys[at]), keys, at)
                self._set_tiers(node, keys[at], end - at, instance, bit, 0)
            else:
                end = at + 1
                while end < len(keys) and keys[end] not in where:
                    end += 1
                self._create(keys[at:end], parent, instance, bit)
            parent = keys[end - 1]
            at = end

    def _remove(self, instance: InstanceId, keys: list[ShortKey], bit: int) -> None:
        """Neighbouring pages of a node are removed together, in whichever order they are named:
        leaf-first eviction names them from the last to the first."""
        at = 0
        while at < len(keys):
            node = self._where.get(keys[at])
            if node is None or not node.holders.get(instance, 0) & bit:
                at += 1
                continue
            position = _index(node.keys, keys[at])
            count = _forward(node.keys, position, keys, at)
            first = keys[at]
            if count == 1:
                count = _backward(node.keys, position, keys, at)
                first = keys[at + count - 1]
            self._set_tiers(node, first, count, instance, 0, bit)
            at += count

    def _clear(self, instance: InstanceId) -> None:
        for node in list(self._held.get(instance, ())):
            # A merge may have taken the node out of the tree since the list was made.
            if instance in node.holders and self._where.get(node.keys[0]) is node:
                self._set_tiers(node, node.keys[0], len(node.keys), instance, 0, _ALL_TIERS)
        assert not self._held.get(instance), (instance, "still holds nodes after a clear")

    def _set_tiers(
        self, node: _Node, first: ShortKey, count: int, instance: InstanceId, add: int, remove: int
    ) -> None:
        """Change an instance's tiers of ``count`` pages of ``node`` from page ``first`` on."""
        before = node.holders.get(instance, 0)
        after = (before | add) & ~remove
        if after == before:
            return
        start = _index(node.keys, first)
        if start > 0:
            node = self._split(node, start)[1]
        if count < len(node.keys):
            node = self._split(node, count)[0]
        for tier, bit in BITS.items():
            self._pages[instance][tier] += count * (bool(after & bit) - bool(before & bit))
        holders = {i: tiers for i, tiers in node.holders.items() if i != instance}
        if after:
            holders[instance] = after
            self._held[instance][node] = None
        else:
            self._held[instance].pop(node)
        if holders:
            node.holders = holders
            self._merge_down(self._merge_up(node))
        else:
            self._delete(node)

    # -- the shape: create, split, merge, delete --

    def _create(
        self, keys: list[ShortKey], parent: ShortKey | None, instance: InstanceId, bit: int
    ) -> None:
        """Insert a run of unknown pages below ``parent``."""
        node = _Node(keys, parent, {instance: bit})
        if parent is not None:
            above = self._where.get(parent)
            if above is not None and above.keys[-1] != parent:
                self._split(above, _index(above.keys, parent) + 1)
            self._children.setdefault(parent, set()).add(node)
        self._where.update(dict.fromkeys(keys, node))
        self._nodes += 1
        self._held[instance][node] = None
        for tier, tier_bit in BITS.items():
            self._pages[instance][tier] += len(keys) * (tier_bit == bit)
        first, last = keys[0], keys[-1]  # the node owns and cuts the list
        if not self._children.keys().isdisjoint(keys):
            self._split_at_orphans(node)
        self._merge_down(self._where[last])
        self._merge_up(self._where[first])

    def _split_at_orphans(self, node: _Node) -> None:
        """Chains that waited for a page inside the run of a new node make that page a branch."""
        inner = [i for i, key in enumerate(node.keys[:-1]) if key in self._children]
        for position in reversed(inner):
            node = self._split(node, position + 1)[0]

    def _split(self, node: _Node, at: int) -> tuple[_Node, _Node]:
        """Cut a run before its page ``at``; the new node gets the smaller half."""
        assert 0 < at < len(node.keys), (at, len(node.keys))
        border = node.keys[at - 1]
        if 2 * at > len(node.keys):
            head, tail = node, _Node(node.keys[at:], border, node.holders)
            del node.keys[at:]
            new = tail
        else:
            head, tail = _Node(node.keys[:at], node.parent_key, node.holders), node
            del node.keys[:at]
            self._rehang(node, head)
            node.parent_key = border
            new = head
        below = self._children.setdefault(border, set())
        below.add(tail)
        self._where.update(dict.fromkeys(new.keys, new))
        for instance in new.holders:
            self._held[instance][new] = None
        self._nodes += 1
        return head, tail

    def _merge_up(self, node: _Node) -> _Node:
        """Join a node with the one above if they are one run now; returns the joined node."""
        if node.parent_key is None:
            return node
        above = self._where.get(node.parent_key)
        if above is None or above.holders != node.holders:
            return node
        # Two runs that hang below each other (a faulty sender): one run cannot hang below itself.
        if above.parent_key == node.keys[-1]:
            self._rings += 1
            return node
        if len(self._children[node.parent_key]) > 1:
            return node
        del self._children[node.parent_key]
        if len(above.keys) >= len(node.keys):
            kept, gone = above, node
            kept.keys.extend(gone.keys)
        else:
            kept, gone = node, above
            self._rehang(above, node)
            kept.parent_key = above.parent_key
            kept.keys[:0] = gone.keys
        self._where.update(dict.fromkeys(gone.keys, kept))
        for instance in gone.holders:
            del self._held[instance][gone]
        self._nodes -= 1
        return kept

    def _merge_down(self, node: _Node) -> None:
        below = self._children.get(node.keys[-1], ())
        if len(below) == 1:
            self._merge_up(next(iter(below)))

    def _delete(self, node: _Node) -> None:
        """Take out a node that nobody holds. Its children stay, waiting for its last page."""
        for key in node.keys:
            del self._where[key]
        self._nodes -= 1
        if node.parent_key is None:
            return
        siblings = self._children[node.parent_key]
        siblings.discard(node)
        if not siblings:
            del self._children[node.parent_key]
        elif len(siblings) == 1:
            self._merge_up(next(iter(siblings)))

    def _rehang(self, old: _Node, new: _Node) -> None:
        """``new`` takes the place of ``old`` below its parent."""
        if old.parent_key is not None:
            siblings = self._children[old.parent_key]
            siblings.discard(old)
            siblings.add(new)

    # -- walks --

    def _runs(self, keys: list[ShortKey]) -> Iterator[tuple[int, int, _Holders]]:
        """Half-open intervals ``[start, end)`` of ``keys`` with equal holders, until a gap."""
        where = self._where
        start, total = 0, len(keys)
        while start < total:
            node = where.get(keys[start])
            if node is None:
                return
            run = node.keys
            end = start + len(run)
            if keys[start:end] != run:
                end = start + _forward(run, _index(run, keys[start]), keys, start)
            yield start, end, node.holders
            start = end

    def _parents_first(self, instance: InstanceId) -> Iterator[_Node]:
        """The instance's nodes; each after the one above it, unless they form a ring."""
        waiting = dict(self._held.get(instance, {}))
        for start in list(waiting):
            path: list[_Node] = []
            node: _Node | None = start
            while node is not None and node in waiting:
                del waiting[node]
                path.append(node)
                node = self._where.get(node.parent_key) if node.parent_key is not None else None
            yield from reversed(path)

    # -- invariants --

    def check(self) -> None:
        """Assert every invariant; time proportional to the tree."""
        nodes = set(self._where.values())
        assert len(nodes) == self._nodes, (len(nodes), self._nodes)
        assert sum(len(node.keys) for node in nodes) == len(self._where)
        counted: dict[InstanceId, dict[Tier, int]] = {}
        for node in nodes:
            self._check_node(node)
            for instance, tiers in node.holders.items():
                counts = counted.setdefault(instance, dict.fromkeys(Tier, 0))
                for tier, bit in BITS.items():
                    counts[tier] += len(node.keys) * bool(tiers & bit)
        for instance, pages in self._pages.items():
            assert pages == counted.get(instance, dict.fromkeys(Tier, 0)), instance
            held = {node for node in nodes if instance in node.holders}
            assert held == set(self._held[instance]), instance
        assert counted.keys() <= self._pages.keys()
        linked = 0
        for key, below in self._children.items():
            assert below and below <= nodes, key
            assert all(node.parent_key == key for node in below), key
            linked += len(below)
        assert linked == sum(node.parent_key is not None for node in nodes)

    def _check_node(self, node: _Node) -> None:
        assert node.keys, "empty run"
        assert all(self._where[key] is node for key in node.keys), node.keys
        assert node.holders, node.keys
        assert all(0 < tiers <= _ALL_TIERS for tiers in node.holders.values()), node.holders
        assert self._children.keys().isdisjoint(node.keys[:-1]), "a branch inside a run"
        if node.parent_key is not None:
            above = self._where.get(node.parent_key)
            if above is not None:
                assert above is not node, "hangs below itself"
                assert above.keys[-1] == node.parent_key, "hangs below the middle of a run"
                only = len(self._children[node.parent_key]) == 1
                same = only and above.holders == node.holders
                assert self._rings or not same, "two nodes of one run"


def _index(run: list[ShortKey], key: ShortKey) -> int:
    # The ends first: eviction and growth happen there, and runs are long.
    if run[0] == key:
        return 0
    if run[-1] == key:
        return len(run) - 1
    return run.index(key)


def _forward(run: list[ShortKey], position: int, keys: list[ShortKey], at: int) -> int:
    """How many of ``keys[at:]`` equal ``run[position:]``, page by page."""
    limit = min(len(run) - position, len(keys) - at)
    if run[position : position + limit] == keys[at : at + limit]:
        return limit
    count = 0
    while run[position + count] == keys[at + count]:
        count += 1
    return count


def _backward(run: list[ShortKey], position: int, keys: list[ShortKey], at: int) -> int:
    """How many of ``keys[at:]`` equal ``run[position], run[position - 1], ...``."""
    limit = min(position + 1, len(keys) - at)
    count = 1
    while count < limit and run[position - count] == keys[at + count]:
        count += 1
    return count


def tiers_of_bits(bits: int) -> frozenset[Tier]:
    return frozenset(tier for tier, bit in BITS.items() if bits & bit)


def _tiers(holders: _Holders) -> dict[InstanceId, frozenset[Tier]]:
    return {instance: tiers_of_bits(tiers) for instance, tiers in holders.items()}
