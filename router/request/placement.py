"""From token ids to a plan: page keys, what everybody holds of them, and the policy's choice.

Pure glue: no I/O. A request with several prompts is planned as one. Its prompts' chains may
overlap, and an overlap is computed, moved and stored once, so it is counted once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sglang_memserve.errors import NoInstance
from sglang_memserve.hashing import namespace_seed, page_keys, short_keys
from sglang_memserve.types import InstanceId, PageKey, ShortKey, Tier

from ..cost.bookings import Bookings
from ..members.instances import Instances
from ..policy.base import Policy, decode_candidates
from ..tree.merged import Matcher
from ..values import InstanceView, Match, Plan, Prompt

_NOTHING = Match(0)


@dataclass(frozen=True, slots=True)
class Chain:
    """One prompt: its ids, and the keys of the pages that a cache can serve (the engine always
    computes the last token, so a full last page is not among them)."""

    ids: Sequence[int]
    keys: list[PageKey]
    short: list[ShortKey]


@dataclass(frozen=True, slots=True)
class Keyed:
    """A request's prompts as chains; empty when the tree cannot help.

    ``tokens``: of all prompts. ``pages``: distinct pages that a cache can serve.
    """

    chains: tuple[Chain, ...]
    page_size: int
    tokens: int
    pages: int

    def one_chain(self) -> Sequence[ShortKey]:
        """The pages' keys in the tree's form; none for several prompts."""
        return self.chains[0].short if len(self.chains) == 1 else ()

    def bounded_tokens(self, pages: int) -> int:
        return min(pages, self.pages) * self.page_size


@dataclass(frozen=True, slots=True)
class Holdings:
    """What each instance holds: of every chain (in order), and of all of them together."""

    by_chain: tuple[Mapping[InstanceId, Match], ...]
    whole: Mapping[InstanceId, Match]

    def pages(self, instance: InstanceId) -> int:
        """Distinct pages of the request that ``instance`` holds."""
        return self.whole.get(instance, _NOTHING).pages

    def of_chain(self, chain: int, instance: InstanceId) -> int:
        return self.by_chain[chain].get(instance, _NOTHING).pages

    def movable(self, chain: int, instance: InstanceId) -> int:
        """Leading pages that others can fetch from ``instance``."""
        return self.by_chain[chain].get(instance, _NOTHING).movable_pages

    def skippable(self, chain: int, instance: InstanceId) -> int:
        """Leading pages that ``instance`` has, where some of them are in HBM alone: a fetch would
        wait for those, which perhaps nobody has in DRAM. None of them where all are in DRAM."""
        match = self.by_chain[chain].get(instance, _NOTHING)
        return match.pages if match.local_pages else 0

    def best_pages(self) -> int:
        return max((match.pages for match in self.whole.values()), default=0)

    def tiers(self, instance: InstanceId) -> dict[Tier, int]:
        """Pages by the tier they would be read from."""
        match = self.whole.get(instance, _NOTHING)
        return {Tier.HBM: match.hbm_pages, Tier.DRAM: match.pages - match.hbm_pages}


def key_prompts(
    prompts: Sequence[Sequence[int]],
    namespaces: Sequence[tuple[str | None, str | None]],
    page_size: int,
) -> Keyed:
    """Raises ValueError for token ids that are none."""
    chains = []
    for ids, (extra_key, cache_salt) in zip(prompts, namespaces, strict=True):
        whole = max(len(ids) - 1, 0) // page_size * page_size
        keys = page_keys(ids[:whole], page_size, namespace_seed(extra_key, cache_salt))
        chains.append(Chain(ids, keys, short_keys(keys)))
    tokens = sum(len(ids) for ids in prompts)
    # Within one chain all keys differ.
    one = len(chains) == 1
    pages = len(chains[0].keys) if one else len({key for chain in chains for key in chain.keys})
    return Keyed(tuple(chains), page_size, tokens, pages)


def opaque(page_size: int) -> Keyed:
    return Keyed((), page_size, 0, 0)


def look_up(tree: Matcher, keyed: Keyed) -> Holdings:
    by_chain = tuple(tree.match(chain.short) for chain in keyed.chains)
    if len(by_chain) == 1:
        return Holdings(by_chain, by_chain[0])
    holders: set[InstanceId] = set().union(*by_chain)
    return Holdings(by_chain, {who: _union(keyed, by_chain, who) for who in holders})


def prompt_of(keyed: Keyed, session: str | None) -> Prompt:
    """The request's size as a policy counts it: for several prompts, their distinct pages and a
    last page's worth of the tails."""
    tokens = keyed.tokens
    if len(keyed.chains) > 1:
        tails = tokens - sum(len(chain.keys) for chain in keyed.chains) * keyed.page_size
        tokens = keyed.pages * keyed.page_size + min(max(tails, 1), keyed.page_size)
    return Prompt(tokens=tokens, page_size=keyed.page_size, session=session)


def decide(
    instances: Instances,
    policy: Policy,
    keyed: Keyed,
    holdings: Holdings,
    session: str | None,
    exclude: Collection[InstanceId] = (),
    bookings: Bookings | None = None,
) -> tuple[Plan, list[InstanceView]]:
    """The policy's plan, and the views it was made from. Raises NoInstance with every reason."""
    views = instances.views(holdings.whole, exclude, bookings, keyed.one_chain())
    try:
        plan = policy.decide(prompt_of(keyed, session), views)
    except NoInstance as error:
        raise error.including(instances.absent(exclude)) from error
    if not any(view.id == plan.decode and view.role.can_decode for view in views):
        plan = replace(plan, reason=f"{plan.reason}; no decode instance can serve")
    return plan, views


def idlest_decode(
    instances: Instances,
    exclude: Collection[InstanceId] = (),
    *,
    turn: int = 0,
    bookings: Bookings | None = None,
) -> InstanceId:
    """Where a request goes whose prompt is unknown. Raises NoInstance with every reason."""
    views = instances.views({}, exclude, bookings)
    try:
        able = decode_candidates(views)
    except NoInstance as error:
        raise error.including(instances.absent(exclude)) from error
    least = min(_load(view) for view in able)
    idlest = [view.id for view in able if _load(view) == least]
    return idlest[turn % len(idlest)]


def _load(view: InstanceView) -> int:
    return view.running_requests + view.waiting_requests


def _union(keyed: Keyed, by_chain: Iterable[Mapping[InstanceId, Match]], who: InstanceId) -> Match:
    pages: set[PageKey] = set()
    hbm: set[PageKey] = set()
    movable: set[PageKey] = set()
    for chain, matches in zip(keyed.chains, by_chain, strict=True):
        match = matches.get(who, _NOTHING)
        pages.update(chain.keys[: match.pages])
        hbm.update(chain.keys[: match.hbm_pages])
        movable.update(chain.keys[: match.movable_pages])
    return Match(len(pages), len(hbm), len(pages) - len(movable))
