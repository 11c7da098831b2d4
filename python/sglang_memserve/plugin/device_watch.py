"""Follows SGLang's radix tree, page key by page key, for the events of the HBM tier.

SGLang offers every node that joins its tree to the linker (write-through at the first insert), with
its keys: that is what came. Before a leaf is evicted its keys are read from the tree: that is what
went. No page is hashed here. Changes are gathered and given to MemPool once a scheduler round, so
that a round costs one lock and one batch of events however much it moved.

SGLang counts the tokens of its tree itself. After each round its count must be ours; if it is not,
something joined or left that we were not told of, and a page told wrongly would cost every request
that trusts it. Then nothing more is said of HBM until the engine flushes its cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..index.journal import Cleared, Dropped, Record, Stored
from ..mempool import MemPool
from ..types import PageKey, Tier

log = logging.getLogger(__name__)


class DeviceWatch:
    """All methods belong to the scheduler thread."""

    def __init__(self, pool: MemPool, page_size: int) -> None:
        self.lost = 0
        self._pool = pool
        self._page_size = page_size
        self._changes: list[Record] = []
        self._silent = False

    def joined(self, keys: Sequence[PageKey], parent: PageKey | None) -> None:
        """A node's pages, under the page before them."""
        if not self._silent:
            self._changes.append(Stored(keys, parent, Tier.HBM))

    def leaves(self, keys: Sequence[str]) -> None:
        """A node's pages, in hexadecimal as SGLang keeps them."""
        if not self._silent:
            gone = [PageKey(bytes.fromhex(key)) for key in keys]
            self._changes.append(Dropped(gone, Tier.HBM))

    def settle(self, tree_tokens: int) -> None:
        """End of a round: ``tree_tokens`` are in SGLang's tree now."""
        if self._changes:
            changes, self._changes = self._changes, []
            self._pool.apply_device(changes)
        pages = self._pool.device_pages
        if pages * self._page_size != tree_tokens and not self._silent:
            self._silent = True
            self.lost += 1
            self._pool.apply_device([Cleared()])
            log.error(
                "SGLang's tree has %d tokens, %d pages of %d were counted: no more events of HBM "
                "until the cache is flushed",
                tree_tokens,
                pages,
                self._page_size,
            )

    def reset(self) -> None:
        """The engine empties its tree; MemPool hears of it by ``clear``."""
        self._changes.clear()
        self._silent = False

    def stats(self) -> dict[str, float]:
        return {"device_watch_lost_total": float(self.lost)}
