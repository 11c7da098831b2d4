"""The page forest of one rank: which block holds which page, and which page goes next.

Theory of operation. A page is named by its key, and a key stands for the whole prefix up to it, so
finding a page is one dictionary look-up and no tree is walked. What makes the pages a forest are
the parent links: a page with resident children is of no use to evict, since its children could no
longer be reached. Hence leaf-first eviction.

A resident page has exactly one block, so all that is known of a page lies in arrays indexed by its
block: no object a page but its key. Keys are shared: a page's key, its children's link to it and
the dictionary's are one object.

- *Parents.* ``_parent[block]`` is a key, not a block: the parent need not be resident (the engine's
  device tier may hold the head of a prefix that we hold the tail of). Children of a parent that is
  not resident are counted in ``_waiting``; when it arrives it takes the count over.
- *Recency* is the eviction policy's, which is told of every use: O(length touched), ancestors are
  not visited. A page is as recent as its most recent descendant, which matters only when it becomes
  a leaf: a removed page leaves its recency to its parent.
- *Pins* are counts. A pinned page is not evicted. A pinned page may be removed by name or by
  ``clear``: then it can no longer be found, and its block becomes an *orphan* that is given back
  when its last pin ends.

    evictable = resident, no resident children, no pins
    every block is in one state: absent | resident | orphan, and orphan implies pins > 0
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..types import BlockId, Eviction, PageKey
from .eviction.registry import make_policy


@dataclass(frozen=True, slots=True)
class Removed:
    """Pages that are no longer readable, and the blocks of those that nobody had pinned."""

    keys: list[PageKey]
    blocks: list[BlockId]


class LocalIndex:
    """Pages in blocks 0 .. total_blocks - 1. Not thread-safe; no method waits."""

    def __init__(self, total_blocks: int, eviction: Eviction) -> None:
        self._total_blocks = total_blocks
        self._block_of: dict[PageKey, BlockId] = {}
        self._key: list[PageKey | None] = [None] * total_blocks
        self._parent: list[PageKey | None] = [None] * total_blocks
        self._children = array("I", bytes(4 * total_blocks))
        self._pins: dict[BlockId, int] = {}
        self._waiting: dict[PageKey, int] = {}
        self._orphans: set[BlockId] = set()
        self._policy = make_policy(eviction, total_blocks)

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._block_of

    @property
    def pinned_blocks(self) -> int:
        """Blocks with at least one pin, orphans included."""
        return len(self._pins)

    @property
    def orphan_blocks(self) -> int:
        return len(self._orphans)

    @property
    def total_blocks(self) -> int:
        return self._total_blocks

    def resize(self, total_blocks: int) -> None:
        """Blocks up to ``total_blocks`` - 1 may hold pages from now on; those above hold none, not
        even as orphans. What was known of blocks that went is kept for when they come back."""
        for block in range(total_blocks, self._total_blocks):
            assert self._key[block] is None and block not in self._pins, f"block {block} is in use"
        more = total_blocks - len(self._key)
        if more > 0:
            self._key += [None] * more
            self._parent += [None] * more
            self._children.frombytes(bytes(4 * more))
        self._total_blocks = total_blocks
        self._policy.resize(total_blocks)

    # -- find --

    def leading(self, keys: Iterable[PageKey]) -> int:
        """How many of ``keys`` are resident before the first that is not."""
        resident = self._block_of
        count = 0
        for key in keys:
            if key not in resident:
                break
            count += 1
        return count

    def match(self, keys: Iterable[PageKey]) -> list[BlockId]:
        """Blocks of the leading resident run of ``keys``. Changes nothing."""
        get = self._block_of.get
        blocks: list[BlockId] = []
        for key in keys:
            block = get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def get(self, key: PageKey) -> BlockId | None:
        return self._block_of.get(key)

    def key_of(self, block: BlockId) -> PageKey | None:
        """The page in ``block``; None for an orphan and where there is none."""
        return self._key[block]

    def pages(self) -> tuple[list[PageKey], list[PageKey | None]]:
        """All resident keys and, in the same order, their parents' keys."""
        parent = self._parent
        return list(self._block_of), [parent[block] for block in self._block_of.values()]

    def orphans(self) -> set[BlockId]:
        """Blocks of removed pages that are still pinned."""
        return set(self._orphans)

    def pins(self) -> dict[BlockId, int]:
        """All pinned blocks and their counts."""
        return dict(self._pins)

    # -- change --

    def insert(
        self,
        keys: Sequence[PageKey],
        blocks: Sequence[BlockId],
        parents: Sequence[PageKey | None],
    ) -> list[PageKey | None]:
        """Make ``blocks[i]`` the block of ``keys[i]``, whose prefix goes on from ``parents[i]``
        (None: it starts a prefix, or nobody knows). The pages are touched.

        No key may be resident, no block in use. Returns the parents as they were linked.
        """
        block_of, key_in, waiting = self._block_of, self._key, self._waiting
        linked: list[PageKey | None] = []
        for key, block, parent in zip(keys, blocks, parents, strict=True):
            assert key not in block_of, f"page {key.hex()} is resident"
            assert key_in[block] is None and block not in self._pins, f"block {block} is in use"
            block_of[key] = block
            key_in[block] = key
            children = waiting.pop(key, 0) if waiting else 0
            self._children[block] = children
            if (children or parent == key) and self._descends(parent, key):
                # Nothing is its own ancestor: whoever named this parent does not know the chain.
                parent = None
            linked.append(parent)
            if parent is not None:
                above = block_of.get(parent)
                if above is None:
                    waiting[parent] = waiting.get(parent, 0) + 1
                else:
                    self._children[above] += 1
                    # One object for one key, whoever computed it.
                    parent = key_in[above]
            self._parent[block] = parent
        self._policy.insert(keys, blocks)
        # Only now: the inner pages of the chain have got their children.
        for block in blocks:
            if not self._children[block]:
                self._policy.offer(block)
        return linked

    def touch(self, blocks: Sequence[BlockId]) -> None:
        """These pages (a chain, head first) were used now; the head counts as used last."""
        self._policy.touch(blocks)

    def pin(self, blocks: Iterable[BlockId]) -> None:
        """One pin more on each; a block named twice gets two."""
        pins = self._pins
        for block in blocks:
            assert self._key[block] is not None, f"block {block} is not resident"
            pins[block] = pins.get(block, 0) + 1

    def unpin(self, blocks: Iterable[BlockId]) -> list[BlockId]:
        """One pin less on each. Returns the orphans among them whose last pin this was."""
        pins = self._pins
        ended: list[BlockId] = []
        for block in blocks:
            assert block in pins, f"block {block} is not pinned"
            pins[block] -= 1
            if pins[block]:
                continue
            del pins[block]
            if block in self._orphans:
                self._orphans.remove(block)
                ended.append(block)
            elif not self._children[block]:
                self._policy.offer(block)
        return ended

    def evict(self, count: int) -> Removed:
        """Remove up to ``count`` pages, leaf first, in the policy's order, never a pinned one."""
        policy, evictable = self._policy, self._evictable
        keys: list[PageKey] = []
        blocks: list[BlockId] = []
        while len(keys) < count:
            block = policy.take(evictable)
            if block is None:
                break
            keys.append(self._unlink(block))
            blocks.append(block)
        policy.evicted(keys)
        return Removed(keys, blocks)

    def evict_blocks(self, blocks: Iterable[BlockId]) -> Removed:
        """Remove the pages of those of ``blocks`` that hold one and are not pinned, leaf or not;
        whatever hangs under them stays."""
        keys: list[PageKey] = []
        freed: list[BlockId] = []
        for block in blocks:
            if self._key[block] is not None and block not in self._pins:
                keys.append(self._unlink(block))
                self._policy.removed(block)
                freed.append(block)
        return Removed(keys, freed)

    def prepare_relocations(self) -> None:
        """Before many pages are moved: keeps their recency exact. O(leaves)."""
        self._policy.tidy(self._evictable)

    def relocate(self, source: BlockId, target: BlockId) -> None:
        """The page of ``source`` lies in ``target`` from now on, as recent as it was (or as the
        page that lay in ``target`` was, if that is newer and was removed by name since
        ``prepare_relocations``).

        ``source`` must be resident, ``target`` not in use. A reader holds block numbers for as
        long as it has them pinned: a pinned ``source`` stays in place for it, as an orphan.
        """
        key = self._key[source]
        assert key is not None, f"block {source} is not resident"
        assert self._key[target] is None and target not in self._pins, f"block {target} is in use"
        self._block_of[key] = target
        for column in (self._key, self._parent):
            column[target], column[source] = column[source], None
        self._children[target], self._children[source] = self._children[source], 0
        self._policy.move(source, target)
        if source in self._pins:
            self._orphans.add(source)
        if not self._children[target]:
            self._policy.offer(target)

    def remove(self, keys: Iterable[PageKey]) -> Removed:
        """Remove those of ``keys`` that are resident, whatever hangs under them stays."""
        removed: list[PageKey] = []
        blocks: list[BlockId] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                continue
            removed.append(self._unlink(block))
            self._policy.removed(block)
            if block in self._pins:
                self._orphans.add(block)
            else:
                blocks.append(block)
        return Removed(removed, blocks)

    def clear(self) -> Removed:
        """Remove every page."""
        keys = list(self._block_of)
        blocks: list[BlockId] = []
        for block in self._block_of.values():
            if block in self._pins:
                self._orphans.add(block)
            else:
                blocks.append(block)
        blocks_known = len(self._key)
        self._block_of = {}
        self._key = [None] * blocks_known
        self._parent = [None] * blocks_known
        self._children = array("I", bytes(4 * blocks_known))
        self._waiting = {}
        self._policy.clear()
        return Removed(keys, blocks)

    # -- inside --

    def _evictable(self, block: int) -> bool:
        return (
            not self._children[block] and block not in self._pins and self._key[block] is not None
        )

    def _descends(self, key: PageKey | None, ancestor: PageKey) -> bool:
        """Whether the links from ``key`` upwards lead to ``ancestor``."""
        while key is not None and key != ancestor:
            above = self._block_of.get(key)
            key = None if above is None else self._parent[above]
        return key is not None

    def _unlink(self, block: BlockId) -> PageKey:
        key = self._key[block]
        assert key is not None, f"block {block} is not resident"
        del self._block_of[key]
        self._key[block] = None
        children = self._children[block]
        if children:
            self._waiting[key] = children
            self._children[block] = 0
        parent = self._parent[block]
        if parent is None:
            return key
        self._parent[block] = None
        above = self._block_of.get(parent)
        if above is None:
            if self._waiting[parent] == 1:
                del self._waiting[parent]
            else:
                self._waiting[parent] -= 1
            return key
        self._children[above] -= 1
        self._policy.outlive(above, block)
        if not self._children[above] and above not in self._pins:
            self._policy.offer(above)
        return key

    def check(self) -> None:
        """Invariants of the whole index; O(blocks)."""
        children: dict[PageKey, int] = {}
        for key, block in self._block_of.items():
            assert self._key[block] == key, (key, block)
            parent = self._parent[block]
            if parent is not None:
                children[parent] = children.get(parent, 0) + 1
        for place, held in enumerate(self._key):
            if held is None:
                assert not self._children[place] and self._parent[place] is None, place
                assert (place in self._pins) == (place in self._orphans), place
            else:
                assert self._block_of[held] == place, (held, place)
                assert self._children[place] == children.pop(held, 0), (held, place)
                assert place not in self._orphans, place
        assert self._waiting == children, (self._waiting, children)
        assert min(self._pins.values(), default=1) > 0
        self._policy.check(list(self._block_of.values()), self._evictable)
