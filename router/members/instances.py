"""Membership: who is there, what for, in which state, and how busy.

Pure: no socket, no task; the clock is injected. ``polling`` is the shell that asks listed URLs, the
app's ``/memserve/*`` routes call the rest. Soft state only: a restarted router learns
everything again from the instances' next heartbeats.

An instance that falls silent is not used after ``expire_s`` and is forgotten, pages included,
after ``FORGET_FACTOR`` times that: a flap in between costs nothing. A URL that comes back with
another generation is another instance: the old one's pages are dropped at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import msgspec
from sglang_memserve.config import parse_role, parse_url
from sglang_memserve.errors import ConfigError, NamespaceMismatch, NoInstance, ProtocolError
from sglang_memserve.protocol.handshake import (
    require_possible,
    require_same_namespace,
    require_same_version,
)
from sglang_memserve.protocol.http import (
    Heartbeat,
    HeartbeatReply,
    InstanceInfo,
    Load,
    RegistrationReply,
)
from sglang_memserve.types import Generation, InstanceId, Role, ShortKey

from ..cost.bookings import NO_SHARE, Bookings
from ..values import InstanceView, Match, Moves, restrain
from .breaker import Breaker, BreakerSettings
from .departures import Departures
from .member import InFlight, Member, MemberStatus, State

FORGET_FACTOR = 3
_UNKNOWN = Generation("")
_PLAIN = Generation("plain")
_NOTHING = Match(0)
_NAMED = 8
_SILENT = "no heartbeat"


class Listener(Protocol):
    """Told of members whose pages are to be followed. ``router.tree.feed.Feed`` is one."""

    def joined(self, info: InstanceInfo) -> None: ...

    def left(self, instance: InstanceId) -> None: ...

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None: ...


class Instances:
    """All members, in the order they joined."""

    def __init__(
        self,
        clock: Callable[[], float],
        listeners: Sequence[Listener] = (),
        *,
        heartbeat_s: float = 2.0,
        expire_s: float = 10.0,
        breaker: BreakerSettings = BreakerSettings(),  # noqa: B008 - frozen
        moves: Moves = Moves.ALL,
    ) -> None:
        self._clock = clock
        self._listeners = list(listeners)
        self._heartbeat_s = heartbeat_s
        self._expire_s = expire_s
        self._breaker = breaker
        self._moves = moves
        self._members: dict[InstanceId, Member] = {}
        self._departures = Departures()

    # -- what instances say --

    def register(self, info: InstanceInfo) -> RegistrationReply:
        """An instance introduces itself; again is fine. A new generation replaces the old one.

        Raises NamespaceMismatch when its model, page size or layout differs from those that are
        here (naming both sides' values), VersionMismatch, ProtocolError for a malformed one.
        """
        self._accept(info, static=False)
        return RegistrationReply(self._heartbeat_s, self._expire_s)

    def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        """``known`` is False for an instance that has to register (again).

        Raises ProtocolError for an unknown role.
        """
        role = _role(beat.role)
        instance = InstanceId(beat.url.rstrip("/"))
        if self._departures.dismissed(instance, beat.generation):
            return HeartbeatReply(known=True)
        member = self._members.get(instance)
        if member is None or member.generation != beat.generation or not member.attached:
            return HeartbeatReply(known=False)
        member.take(member.fixed_role or role)
        member.load = beat.load
        self._seen(member)
        for listener in self._listeners:
            listener.beat(member.id, member.generation, beat.event_seq)
        return HeartbeatReply(known=True)

    def deregister(self, url: str, generation: str) -> None:
        """It leaves. Another generation's word does not count; the unknown are ignored."""
        member = self._members.get(InstanceId(url.rstrip("/")))
        if member is None or member.generation != generation:
            return
        if member.static:
            self._lose(member, "has left")
        else:
            self._remove(member, "it deregistered")

    # -- what the operator says, and what asking listed URLs showed --

    def add_static(self, url: str, role: Role | None = None) -> InstanceId:
        """List a URL: it is STARTING until it answers. ``role`` overrides its own. A drain ends.

        Raises ConfigError for a malformed URL.
        """
        instance = InstanceId(parse_url(url))
        self._departures.welcome(instance)
        member = self._members.get(instance)
        if member is None:
            member = self._new_member(instance, _UNKNOWN, role or Role.BOTH)
            self._members[instance] = member
        elif member.draining:
            member.draining = False
            if member.generation == _UNKNOWN:
                member.state = State.STARTING
            else:
                member.turn(State.READY)
        member.static = True
        member.fixed_role = role
        member.take(role or member.role)
        return instance

    def answered(self, listed: InstanceId, info: InstanceInfo) -> None:
        """A listed URL turned out to be one of ours. Raises what ``register`` raises, and
        ConfigError when the same instance is here under its own URL."""
        for member in self._members.values():
            if member.attached and member.generation == info.generation and member.id != listed:
                raise ConfigError(f"is here as {member.id}")
        self._accept(msgspec.structs.replace(info, url=listed), static=True)

    def answered_plain(self, listed: InstanceId, model: str, load: Load) -> None:
        """A listed URL turned out to be SGLang without MemServe: it serves, and shares nothing.

        Raises NamespaceMismatch when it serves another model.
        """
        member = self._members.get(listed)
        if member is None:
            return
        self._require_same_model(listed, model)
        if member.attached:
            self._lose(member, "answers without MemServe now")
            if listed not in self._members:
                return
            member = self._members[listed]
        member.generation = _PLAIN
        member.info = None
        member.model = model
        member.load = load
        self._seen(member)

    def unreachable(self, listed: InstanceId, error: str) -> None:
        """A listed URL did not answer, or was refused."""
        member = self._members.get(listed)
        if member is None:
            return
        member.last_error = error
        if member.state is State.READY:
            member.turn(State.UNHEALTHY, error)
        if member.attached and self._clock() - member.seen_at > FORGET_FACTOR * self._expire_s:
            self._lose(member, error)

    def drain(self, instance: InstanceId) -> Generation:
        """Send nothing more to this boot, which is returned; what is in flight goes on. Another
        boot, or being added by hand, ends it. Raises ConfigError if unknown."""
        member = self._require(instance)
        member.draining = True
        member.turn(State.DRAINING)
        return member.generation

    def remove(self, instance: InstanceId) -> None:
        """Forget it; it may register again, unless it was draining. Raises ConfigError if it is
        unknown."""
        self._remove(self._require(instance), "was removed")

    def dismiss(self, instance: InstanceId, generation: Generation) -> None:
        """This boot's drain is over: remove it. A drain that ended otherwise is ignored."""
        member = self._members.get(instance)
        if member is not None and member.draining and member.generation == generation:
            self._remove(member, "was drained")

    def assign(self, instance: InstanceId, role: Role) -> None:
        """A role from the operator, which holds for a listed URL whatever it says itself."""
        member = self._require(instance)
        member.take(role)
        if member.fixed_role is not None or member.info is None:
            member.fixed_role = role

    def set_role(self, instance: InstanceId, role: Role) -> None:
        """An assignment, at once; the instance's next heartbeat confirms or overrules it."""
        self._require(instance).take(role)

    def expire(self) -> None:
        """Call about once a second: look for those that fell silent. Requests that wait for one
        of them in vain are interrupted."""
        now = self._clock()
        for member in list(self._members.values()):
            silent_s = now - member.seen_at
            if silent_s > self._expire_s:
                for flight in list(member.flights):
                    flight.lose(self._expire_s, f"nothing heard for {silent_s:.0f} s")
            if member.static:
                continue
            why = f"{_SILENT} for {silent_s:.0f} s"
            if silent_s > FORGET_FACTOR * self._expire_s:
                if member.last_error.startswith(_SILENT):
                    member.last_error = ""
                self._remove(member, why)
            elif silent_s > self._expire_s and member.state is not State.DRAINING:
                member.last_error = why
                member.turn(State.UNHEALTHY, why)

    # -- what a decision needs --

    def views(
        self,
        matches: Mapping[InstanceId, Match],
        exclude: Collection[InstanceId] = (),
        bookings: Bookings | None = None,
        keys: Sequence[ShortKey] = (),
    ) -> list[InstanceView]:
        """Those that may be used now, in a steady order, with what they hold of the prompt.

        ``exclude``: instances that failed this request already. ``bookings``: what is decided and
        not seen yet, for a prompt of ``keys``.
        """
        now = self._clock()
        views = []
        ready = [
            member
            for member in self._members.values()
            if member.id not in exclude and member.state is State.READY
        ]
        # Where all breakers are open, trying is better than refusing.
        for member in [one for one in ready if one.unavailable(now) is None] or ready:
            match = matches.get(member.id, _NOTHING) if member.attached else _NOTHING
            share = bookings.share(member.id, match, keys) if bookings is not None else NO_SHARE
            views.append(restrain(member.view(match, share), self._moves))
        return views

    def unavailable(self, exclude: Collection[InstanceId] = ()) -> dict[str, str]:
        """Why each of the others is not among ``views``: for ``NoInstance.including``."""
        now = self._clock()
        reasons: dict[str, str] = {}
        for member in self._members.values():
            why = member.unavailable(now)
            if why is None and member.id in exclude:
                why = "failed this request" + (f": {member.last_error}" * bool(member.last_error))
            if why is not None:
                reasons[member.id] = why
        return reasons

    def absent(self, exclude: Collection[InstanceId] = ()) -> dict[str, str]:
        """``unavailable``, and behind those the last few that have left, with what became of
        them: for whoever has to say that nobody can serve."""
        left: dict[str, str] = {
            status.id: f"left: {status.last_error}" for status in self.gone()[-_NAMED:]
        }
        return self.unavailable(exclude) | left

    def begin(self, instance: InstanceId, uncached_tokens: int) -> InFlight:
        """Book a request that is sent there now. Raises NoInstance when it has left."""
        member = self._members.get(instance)
        if member is None:
            raise NoInstance({instance: "has left"})
        return InFlight(member, uncached_tokens, self._clock)

    # -- looking at it --

    def members(self) -> list[MemberStatus]:
        now = self._clock()
        return [member.status(now) for member in self._members.values()]

    def gone(self) -> list[MemberStatus]:
        """``Departures.recent``, as they are now: requests they still had may have ended since."""
        now = self._clock()
        return [member.status(now) for member in self._departures.recent(now, self._members)]

    def info(self, instance: InstanceId) -> InstanceInfo | None:
        """None for an unknown instance, one that never answered, or plain SGLang."""
        member = self._members.get(instance)
        return member.info if member is not None else None

    def reference(self) -> InstanceInfo | None:
        """Any member's info: all agree on model, page size and layout. None before the first."""
        return next((m.info for m in self._members.values() if m.info is not None), None)

    def context_length(self) -> int:
        """Tokens of the longest prompt that any member takes; 0 before the first is known. One that
        takes less, or says so, must not decide for the others."""
        infos = (member.info for member in self._members.values())
        return max((info.context_length for info in infos if info is not None), default=0)

    def statics(self) -> list[InstanceId]:
        return [member.id for member in self._members.values() if member.static]

    # -- inside --

    def _accept(self, info: InstanceInfo, *, static: bool) -> None:
        require_same_version(info.protocol)
        try:
            instance = InstanceId(parse_url(info.url))
        except ConfigError as error:
            raise ProtocolError(str(error)) from error
        if info.page_size <= 0 or not info.ranks or not info.generation:
            raise ProtocolError(f"{info.url}: an instance needs pages, ranks and a generation")
        require_possible(info.namespace)
        role = _role(info.role)
        info = msgspec.structs.replace(info, url=instance)
        self._require_same_pages(info)
        if self._departures.dismissed(instance, info.generation):
            return
        self._departures.welcome(instance)
        member = self._members.get(instance)
        if member is None:
            if static:
                return  # removed while it was being asked
            member = self._new_member(instance, _UNKNOWN, role)
        elif member.generation != info.generation:
            if member.attached:
                self._detach(member)
            member = self._replace(member)
        self._drop_alias(instance, info.generation)
        self._members[instance] = member
        member.generation = Generation(info.generation)
        member.info = info
        member.model = info.served_model_name
        member.take(member.fixed_role or role)
        self._seen(member)
        if not member.attached:
            member.attached = True
            for listener in self._listeners:
                listener.joined(info)

    def _require_same_pages(self, info: InstanceInfo) -> None:
        self._require_same_model(InstanceId(info.url), info.served_model_name)
        other = self._other(InstanceId(info.url))
        if other is None or other.info is None:
            return
        ours = other.info
        require_same_namespace(ours.namespace, info.namespace, other.id, info.url)
        for name in ("page_size", "layout_hash"):
            here, there = getattr(ours, name), getattr(info, name)
            if here != there:
                raise NamespaceMismatch(
                    f"{name}: {other.id} has {here!r}, {info.url} has {there!r}"
                )

    def _require_same_model(self, instance: InstanceId, model: str) -> None:
        for member in self._members.values():
            if member.id == instance or member.state is not State.READY or not member.model:
                continue
            if model and member.model != model:
                raise NamespaceMismatch(
                    f"{instance} serves model {model!r}, {member.id} serves {member.model!r}: "
                    "one router serves one model"
                )

    def _other(self, instance: InstanceId) -> Member | None:
        followed = (m for m in self._members.values() if m.attached and m.id != instance)
        return next(followed, None)

    def _drop_alias(self, instance: InstanceId, generation: str) -> None:
        """A listed URL was another name of what now registers under its own."""
        for member in list(self._members.values()):
            if member.id != instance and member.attached and member.generation == generation:
                self._lose(member, f"is here as {instance}")

    def _new_member(self, instance: InstanceId, generation: Generation, role: Role) -> Member:
        return Member(instance, generation, role, Breaker(self._breaker), self._clock())

    def _replace(self, old: Member) -> Member:
        """The same place for another boot: nothing is carried over but the operator's words about
        the place. Requests in flight to the old one keep counting there, where nobody looks."""
        new = self._new_member(old.id, _UNKNOWN, old.role)
        new.static, new.fixed_role = old.static, old.fixed_role
        new.reached = old.reached
        return new

    def _seen(self, member: Member) -> None:
        member.seen_at = self._clock()
        if member.state in (State.STARTING, State.UNHEALTHY):
            member.last_error = ""
        member.reached = True
        member.turn(State.DRAINING if member.draining else State.READY)

    def _lose(self, member: Member, error: str) -> None:
        """A listed URL stays on the list when what was there has gone, unless it was to go."""
        if member.draining:
            self._remove(member, error)
            return
        if member.attached:
            self._detach(member)
        fresh = self._replace(member)
        member.turn(State.LEFT, error)
        fresh.last_error = error
        fresh.state = State.UNHEALTHY
        self._members[member.id] = fresh

    def _remove(self, member: Member, why: str) -> None:
        """However a drain ends, its boot stays away: what it says is heard politely and ignored."""
        if member.draining:
            self._departures.dismiss(member.id, member.generation)
        if member.attached:
            self._detach(member)
        del self._members[member.id]
        member.last_error = why if not member.last_error else f"{why} ({member.last_error})"
        member.turn(State.LEFT, member.last_error)
        if member.reached:
            self._departures.remember(member, self._clock())

    def _detach(self, member: Member) -> None:
        member.attached = False
        for listener in self._listeners:
            listener.left(member.id)

    def _require(self, instance: InstanceId) -> Member:
        member = self._members.get(instance)
        if member is None:
            raise ConfigError(f"unknown instance {instance}")
        return member

    def check(self) -> None:
        for instance, member in self._members.items():
            assert member.id == instance
            assert member.state is not State.LEFT, instance
            assert member.in_flight_requests >= 0, member.in_flight_requests
            assert member.in_flight_prefill_tokens >= 0, member.in_flight_prefill_tokens
            assert member.in_flight_requests or not member.in_flight_prefill_tokens, instance
            assert not member.attached or member.info is not None, instance
            assert not member.draining or member.state is not State.READY, instance
            member.breaker.check()


def _role(text: str) -> Role:
    try:
        return parse_role(text)
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
