"""From ids to a plan: pages that count once, what is called cached, names of the model."""

from __future__ import annotations

from sglang_memserve.errors import NoInstance
from sglang_memserve.hashing import page_keys, short_key
from sglang_memserve.protocol.events import BlockStored
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import InstanceInfo, RankInfo
from sglang_memserve.router.members.instances import Instances
from sglang_memserve.router.members.models import ModelNames
from sglang_memserve.router.policy.base import Rotation
from sglang_memserve.router.policy.round_robin import RoundRobin
from sglang_memserve.router.request.placement import (
    Holdings,
    Keyed,
    decide,
    idlest_decode,
    key_prompts,
    look_up,
    prompt_of,
)
from sglang_memserve.router.request.steps import Result
from sglang_memserve.router.tree.reference import GlobalTree
from sglang_memserve.router.values import Match
from sglang_memserve.types import InstanceId, Namespace, Tier

PAGE = 4
A, B = InstanceId("http://a:1"), InstanceId("http://b:1")
NONE = (None, None)
NOTHING = Holdings(({},), {})


def keyed_of(*prompts: list[int]) -> Keyed:
    return key_prompts(prompts, [NONE] * len(prompts), PAGE)


def tree_with(**held: list[int]) -> GlobalTree:
    tree = GlobalTree()
    for name, ids in held.items():
        keys = [short_key(key) for key in page_keys(ids, PAGE)]
        event = BlockStored(list(keys), None, [], PAGE, medium=Tier.DRAM.value)
        tree.apply(A if name == "a" else B, event)
    return tree


def instances_of(*roles: str, model: str = "m") -> Instances:
    instances = Instances(lambda: 0.0)
    namespace = Namespace(model, "w", "bfloat16", PAGE, 1, 1, 8, 8, 0, 1)
    for number, role in enumerate(roles):
        info = InstanceInfo(
            protocol=1,
            url=f"http://{'ab'[number]}:1",
            generation=f"g{number}",
            role=role,
            model_path="/models/m",
            served_model_name=model,
            layout_hash=layout_hash(namespace),
            namespace=namespace,
            page_size=PAGE,
            context_length=1000,
            max_total_tokens=1000,
            events_address="tcp://a:3",
            ranks=[RankInfo(0, "tcp://a:2", "tcp://a:3", 10, namespace.block_bytes)],
        )
        instances.register(info)
    return instances


def test_the_last_token_is_always_left_to_compute() -> None:
    assert [keyed_of(list(range(n))).pages for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_one_prompt_is_counted_as_it_is() -> None:
    ids = list(range(10))
    keyed = keyed_of(ids)
    assert prompt_of(keyed, "s").tokens == 10
    holdings = look_up(tree_with(a=ids, b=ids[:4]), keyed)
    assert holdings.whole == {A: Match(2), B: Match(1)}
    assert holdings.best_pages() == 2
    assert holdings.tiers(B) == {Tier.HBM: 0, Tier.DRAM: 1}
    assert holdings.pages(InstanceId("http://c")) == 0


def test_what_prompts_of_a_batch_share_is_counted_once() -> None:
    shared = list(range(8))
    keyed = keyed_of([*shared, 90, 91, 92, 93, 94], [*shared, 80, 81], [70])
    assert keyed.tokens == 24
    assert keyed.pages == 3  # two shared pages and one of the first prompt's own
    assert prompt_of(keyed, None).tokens == 3 * PAGE + PAGE
    holdings = look_up(tree_with(a=shared, b=shared[:4]), keyed)
    assert holdings.whole == {A: Match(2), B: Match(1)}
    assert [holdings.of_chain(i, A) for i in range(3)] == [2, 2, 0]


def test_a_plan_is_made_from_what_is_held() -> None:
    ids = list(range(40))
    keyed = keyed_of(ids)
    instances = instances_of("prefill", "decode")
    policy = RoundRobin(Rotation(), 0)
    plan, views = decide(instances, policy, keyed, look_up(tree_with(a=ids), keyed), None)
    assert (plan.decode, plan.decode_source) == (B, A)
    assert [view.match.pages for view in views] == [9, 0]


def test_nobody_to_serve_is_explained_for_everybody() -> None:
    instances = instances_of("prefill", "decode")
    for attempt in (
        lambda: idlest_decode(instances, {A, B}),
        lambda: decide(
            instances, RoundRobin(Rotation(), 0), keyed_of([1, 2]), NOTHING,
            None, {A, B},
        ),
    ):  # fmt: skip
        try:
            attempt()
        except NoInstance as error:
            assert set(error.reasons) == {A, B}
        else:
            raise AssertionError("somebody serves")


def test_cached_means_computed_by_nobody() -> None:
    keyed = keyed_of(list(range(20)))  # four pages a cache can serve
    assert Result(None, 2).cached_tokens(keyed) == 8
    assert Result(None, 9).cached_tokens(keyed) == 16
    # P had 8 tokens and computed the rest; all of it came over.
    assert Result(8, 4).cached_tokens(keyed) == 8
    # P had everything, but only one page came over: D computes what follows.
    assert Result(20, 1).cached_tokens(keyed) == 4
    assert Result(20, 4).cached_tokens(keyed) == 16


def test_names_of_the_model() -> None:
    names = ModelNames(instances_of("both", model="org/m:v1"))
    for known in ("org/m:v1", "/models/m", "default", "org/m:v1:adapter", "default:adapter"):
        assert names.known(known), known
    for unknown in ("gpt-4", "org/m", "org/m:v2", ""):
        assert not names.known(unknown), unknown
    assert names.adapter("org/m:v1:adapter") == "adapter"
    assert names.adapter("org/m:v1") is None
    # Nobody has said yet what is served here.
    assert ModelNames(Instances(lambda: 0.0)).known("anything")
