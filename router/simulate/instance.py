"""One instance as others see it: its engine, its pages, its events and heartbeats.

Whoever wants pages of it that it has not computed yet waits until they are in DRAM, as a lease
request does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_memserve.hashing import short_keys
from sglang_memserve.protocol.events import BlockRemoved, BlockStored, Event
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import Heartbeat, InstanceInfo, Load, RankInfo
from sglang_memserve.types import Eviction, InstanceId, Namespace, PageKey, Role, Tier

from .agenda import Agenda, Alarm
from .engine import Engine
from .memory import Memory
from .pages import Change
from .profile import Profile

Publish = Callable[[InstanceId, Event], None]


class _Waiter:
    """For one page, until a deadline."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then
        self.deadline: Alarm | None = None


class Instance:
    """``publish`` hears its events, in order."""

    def __init__(
        self,
        id: InstanceId,
        role: Role,
        agenda: Agenda,
        profile: Profile,
        *,
        page_tokens: int,
        dram_bytes: int,
        eviction: Eviction,
        publish: Publish,
    ) -> None:
        self.id = id
        self.role = role
        self._agenda = agenda
        self._page_tokens = page_tokens
        self._publish = publish
        self._waiters: dict[PageKey, list[_Waiter]] = {}
        self.page_bytes = page_tokens * profile.kv_bytes_per_token
        self.memory = Memory(
            profile.hbm_tokens // page_tokens,
            dram_bytes // self.page_bytes,
            eviction,
            self._tell,
            lambda: agenda.now,
        )
        self.engine = Engine(agenda, profile, self.memory, page_tokens)
        self.prefills = 0
        self.decodes = 0

    # -- pages for others --

    def movable(self, keys: Sequence[PageKey]) -> int:
        """Leading pages that others can fetch."""
        return self.memory.dram.index.leading(keys)

    def once_held(self, key: PageKey, deadline: float, then: Callable[[], None]) -> None:
        """``then``: as soon as the page is in DRAM, or when it is too late."""
        waiter = _Waiter(then)
        self._waiters.setdefault(key, []).append(waiter)

        def give_up() -> None:
            waiters = self._waiters[key]
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[key]
            then()

        waiter.deadline = self._agenda.at(deadline, give_up)

    # -- what it says --

    def info(self) -> InstanceInfo:
        size = self._page_tokens
        namespace = Namespace("m", "w", "bfloat16", size, 1, 1, 8, 8, 0, 1)
        return InstanceInfo(
            protocol=1,
            url=self.id,
            generation=self.id,
            role=self.role.value,
            model_path="m",
            served_model_name="m",
            layout_hash=layout_hash(namespace),
            namespace=namespace,
            page_size=size,
            context_length=self.memory.hbm.total * size,
            max_total_tokens=self.memory.hbm.total * size,
            events_address="",
            ranks=[RankInfo(0, "", "", self.memory.dram.total, self.page_bytes)],
        )

    def heartbeat(self) -> Heartbeat:
        engine = self.engine
        total = self.memory.hbm.total * self._page_tokens
        load = Load(engine.running, engine.waiting, engine.used_tokens, total)
        return Heartbeat(self.id, self.id, self.role.value, load)

    def _tell(self, tier: Tier, keys: Sequence[PageKey], first: int, change: Change) -> None:
        if change.removed:
            gone = list(short_keys(change.removed))
            self._publish(self.id, BlockRemoved([*gone], medium=tier.value))
        if not change.stored:
            return
        stored = [*short_keys(change.stored)]
        parent = short_keys([keys[first - 1]])[0] if first else None
        event = BlockStored([*stored], parent, [], self._page_tokens, medium=tier.value)
        self._publish(self.id, event)
        if tier is Tier.DRAM and self._waiters:
            for key in change.stored:
                for waiter in self._waiters.pop(key, ()):
                    assert waiter.deadline is not None
                    waiter.deadline.cancel()
                    self._agenda.after(0.0, waiter.then)

    def check(self) -> None:
        self.memory.check()
        self.engine.check()
        assert all(self._waiters.values())
