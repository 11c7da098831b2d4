"""Our page keys against SGLang's own, and our stand-in for its C++ extension against it."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.mem_cache import utils as sglang_utils
from sglang.srt.mem_cache.cpp_utils import native_hash as sglang_native
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang_memserve import hashing, kernels
from sglang_memserve.plugin import hooks

PAGE_SIZES = (1, 2, 16, 64)
# Kept from being hooked by another test in this process.
ORIGINAL = getattr(sglang_native.get_native_hash, "__wrapped__", sglang_native.get_native_hash)


def sglang_keys(key: Any, page_size: int, prior: str | None = None) -> list[str]:
    """SGLang's seeding with our digest in place of the extension."""
    if prior is None:
        prior = sglang_utils.storage_namespace_seed(key.extra_key, key.cache_salt)
    keys = hooks.native_hash(key, bytes.fromhex(prior) if prior else None, page_size)
    assert isinstance(keys, list)
    return keys


@pytest.fixture(params=["native", "portable"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with native code, where it is built, and without."""
    if request.param == "portable":
        monkeypatch.setattr(hashing, "native", lambda: None)
    elif kernels.native() is None:
        pytest.skip("no native code here")


@pytest.fixture(scope="module")
def extension() -> Any:
    """SGLang's own function, where its extension can be built."""
    try:
        sglang_native._load_native_hash_module()
    except RuntimeError as error:
        pytest.skip(f"SGLang's hash extension cannot be built here: {error}")
    return ORIGINAL


def tokens(count: int, seed: int, low: int = 0, high: int = 2**32 - 1) -> list[int]:
    source = random.Random(seed)
    return [source.randint(low, high) for _ in range(count)]


@pytest.mark.parametrize(
    ("extra_key", "salt"),
    [(None, None), ("a", None), (None, "b"), ("a", "b"), ("", None), ("ab", "c"), ("a", "bc")],
)
def test_namespace_seed(extra_key: str | None, salt: str | None) -> None:
    theirs = sglang_utils.storage_namespace_seed(extra_key, salt)
    ours = hashing.namespace_seed(extra_key, salt)
    assert (ours.hex() if ours else None) == theirs


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 200])
def test_page_keys(extension: Any, page_size: int, count: int) -> None:
    ids = tokens(count, seed=count)
    full = count // page_size * page_size
    for kind in ("I", "q"):
        theirs = extension(array(kind, ids[:full]), None, page_size) if full else []
        assert [key.hex() for key in hashing.page_keys(ids, page_size)] == theirs


def test_page_keys_go_on_from_a_parent(extension: Any) -> None:
    ids = tokens(96, seed=5)
    whole = hashing.page_keys(ids, 16)
    assert hashing.page_keys(ids[48:], 16, whole[2]) == whole[3:]
    assert extension(array("q", ids[48:]), whole[2], 16) == [key.hex() for key in whole[3:]]


def test_keys_of_a_request_with_a_salt() -> None:
    ids = tokens(64, seed=6, high=50_000)
    key = RadixKey(array("q", ids), extra_key="lora", cache_salt="tenant")
    seed = hashing.namespace_seed("lora", "tenant")
    ours = [page.hex() for page in hashing.page_keys(ids, 16, seed)]
    assert ours == sglang_keys(key, 16)
    assert ours != sglang_keys(RadixKey(array("q", ids)), 16)


@pytest.mark.parametrize("wrong", [-1, 2**32, 2**64, 1.5, "7", None])
def test_what_is_no_token_id_is_refused(wrong: Any) -> None:
    for ids in ([1, wrong, 3], (wrong,)):
        with pytest.raises(ValueError, match="token ids"):
            hashing.page_keys(ids, 1)
    with pytest.raises(ValueError, match="page size"):
        hashing.page_keys([1], 0)
    with pytest.raises(ValueError, match="32 bytes"):
        hashing.page_keys([1], 1, b"short")


def test_short_keys_are_sglangs() -> None:
    for key in hashing.page_keys(tokens(160, seed=7), 16):
        assert hashing.short_key(key) == sglang_utils.hash_str_to_int64(key.hex())


@pytest.mark.parametrize("page_size", [None, 1, 3, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 16, 17, 40])
@pytest.mark.parametrize("prior", [None, bytes(range(32))])
def test_the_stand_in_equals_the_extension(
    extension: Any, page_size: int | None, count: int, prior: bytes | None
) -> None:
    ids = tokens(count + 1, seed=count)
    wide = [*ids[:5], 2**40, *ids[5:]][: count + 1]
    cases: list[Any] = [ids[:count], array("I", ids[:count]), array("q", ids[:count])]
    cases += [array("q", wide[:count])]
    cases += [RadixKey(array("q", source), is_bigram=bi) for source in (ids, wide) for bi in (0, 1)]
    cases += [RadixKey(array("q", ids), limit=count), list(pairwise(ids))]
    for case in cases:
        assert hooks.native_hash(case, prior, page_size) == extension(case, prior, page_size)


def test_the_stand_in_refuses_what_the_extension_refuses() -> None:
    with pytest.raises(ValueError, match="parent digest"):
        hooks.native_hash([1, 2], b"short", 1)
    with pytest.raises(ValueError, match="token ids"):
        hooks.native_hash([1, -2], None, 1)
    with pytest.raises(ValueError, match="token ids"):
        hooks.native_hash([2**64], None, 1)
    with pytest.raises(ValueError, match="page size"):
        hooks.native_hash([1], None, 0)
