"""The CPU attention against fp32 attention over what the page table says, on random layouts."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang_memserve.plugin import cpu_kernels  # noqa: E402
from sglang_memserve.plugin.attention import MemServeCpuAttention  # noqa: E402

PAGE = 16
POOL_SLOTS = 8192


class Pool:
    """One layer's K and V, with SGLang's names."""

    def __init__(self, kv_heads: int, dim: int, v_dim: int, dtype: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (POOL_SLOTS, kv_heads)
        self.keys = torch.randn(*shape, dim, generator=generator).to(dtype)
        self.values = torch.randn(*shape, v_dim, generator=generator).to(dtype)

    def get_key_buffer(self, layer_id: int) -> Any:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> Any:
        return self.values

    def set_kv_buffer(self, layer: Any, where: Any, k: Any, v: Any) -> None:
        self.keys[where.loc] = k.to(self.keys.dtype)
        self.values[where.loc] = v.to(self.values.dtype)


class Rig:
    """A backend over a random page table, and the obviously right attention beside it."""

    def __init__(
        self,
        heads: tuple[int, int] = (9, 3),
        dim: int = 64,
        v_dim: int | None = None,
        dtype: Any = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self.q_heads, self.kv_heads = heads
        self.dim, self.v_dim, self.dtype = dim, v_dim or dim, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = Pool(self.kv_heads, dim, self.v_dim, dtype, seed + 1)
        self.table = torch.zeros(64, 4096, dtype=torch.int32)
        self.free_pages = iter(
            (torch.randperm(POOL_SLOTS // PAGE - 1, generator=self.generator) + 1).tolist()
        )
        self.backend = MemServeCpuAttention(
            SimpleNamespace(
                use_mla_backend=False,
                model_config=SimpleNamespace(is_encoder_decoder=False),
                device="cpu",
                req_to_token_pool=SimpleNamespace(req_to_token=self.table),
                token_to_kv_pool=self.pool,
            )
        )

    def layer(self, **changes: Any) -> Any:
        fields = {
            "layer_id": 0,
            "tp_q_head_num": self.q_heads,
            "tp_k_head_num": self.kv_heads,
            "qk_head_dim": self.dim,
            "v_head_dim": self.v_dim,
            "scaling": self.dim**-0.5,
            "logit_cap": 0.0,
            "logit_capping_method": "tanh",
            "sliding_window_size": -1,
            "is_cross_attention": False,
            "attn_type": AttentionType.DECODER,
            "xai_temperature_len": -1,
        }
        return SimpleNamespace(**(fields | changes))

    def place(self, request: int, length: int) -> Any:
        """Give ``request`` pages for ``length`` tokens, in random order; returns its slots."""
        pages = torch.tensor(list(itertools.islice(self.free_pages, -(-length // PAGE))))
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).view(-1)[:length]
        self.table[request, :length] = slots.to(torch.int32)
        return slots

    def random(self, *shape: int) -> Any:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def run(self, parts: list[tuple[int, int]], layer: Any, *, decode: bool = False) -> None:
        """One forward of requests with (prefix, new) tokens; compares every row."""
        slots = [self.place(index + 1, prefix + new) for index, (prefix, new) in enumerate(parts)]
        total = sum(new for _, new in parts)
        query = self.random(total, self.q_heads * self.dim)
        key = self.random(total, self.kv_heads, self.dim)
        value = self.random(total, self.kv_heads, self.v_dim)
        lengths = torch.tensor([prefix + new for prefix, new in parts])
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            spec_info=None,
            seq_lens_cpu=lengths,
            seq_lens=lengths,
            req_pool_indices=torch.arange(1, len(parts) + 1),
            extend_prefix_lens_cpu=[prefix for prefix, _ in parts],
            extend_seq_lens_cpu=[new for _, new in parts],
            out_cache_loc=torch.cat(
                [own[prefix:] for own, (prefix, _) in zip(slots, parts, strict=True)]
            ),
        )
        self.backend.init_forward_metadata(batch)
        forward = self.backend.forward_decode if decode else self.backend.forward_extend
        out = forward(query, key, value, layer, batch)
        assert out.shape == (total, self.q_heads * self.v_dim)
        start = 0
        for own, (_, new) in zip(slots, parts, strict=True):
            rows = query[start : start + new].view(new, self.q_heads, self.dim)
            right = reference(rows, self.pool.keys[own], self.pool.values[own], layer)
            wrong = out[start : start + new].view_as(right).float() - right
            assert wrong.abs().max() < (2e-5 if self.dtype == torch.float32 else 2.5e-2)
            start += new


def reference(query: Any, key: Any, value: Any, layer: Any) -> Any:
    """fp32 attention, one row and one head at a time in effect; the last rows of the sequence."""
    rows, q_heads, _ = query.shape
    length, kv_heads = key.shape[:2]
    key, value = (x.float().repeat_interleave(q_heads // kv_heads, 1) for x in (key, value))
    scores = torch.einsum("rhd,shd->hrs", query.float(), key) * layer.scaling
    if layer.logit_cap > 0:
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
    position = torch.arange(length - rows, length)[:, None]
    other = torch.arange(length)[None]
    visible = torch.ones(rows, length, dtype=torch.bool)
    if layer.attn_type == AttentionType.DECODER:
        visible = other <= position
        if layer.sliding_window_size >= 0:
            visible &= other >= position - layer.sliding_window_size
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hrs,shd->rhd", weights, value)


HEADS = [(9, 3), (4, 4), (8, 1), (4, 2), (1, 1)]


@pytest.mark.parametrize("heads", HEADS)
def test_extend_of_ragged_batches(heads: tuple[int, int]) -> None:
    rig = Rig(heads=heads, dim=32)
    rig.run([(0, 1), (0, 77), (16, 1), (16, 16), (160, 33), (48, 200)], rig.layer())


@pytest.mark.parametrize("heads", HEADS)
def test_decode_of_ragged_batches(heads: tuple[int, int]) -> None:
    rig = Rig(heads=heads, dim=32)
    parts = [(length - 1, 1) for length in (1, 2, 15, 16, 17, 300, 310, 333, 1500, 1400)]
    rig.run(parts, rig.layer(), decode=True)


def test_exact_in_fp32() -> None:
    rig = Rig(heads=(4, 2), dim=32, dtype=torch.float32)
    rig.run([(0, 40), (64, 16), (512, 130)], rig.layer())
    rig.run([(99, 1), (100, 1), (700, 1)], rig.layer(), decode=True)


@pytest.mark.parametrize("window", [0, 1, 15, 16, 64, 1000])
def test_sliding_window(window: int) -> None:
    rig = Rig(heads=(4, 2), dim=32)
    layer = rig.layer(sliding_window_size=window)
    rig.run([(0, 150), (48, 16), (320, 40)], layer)
    rig.run([(length - 1, 1) for length in (1, 16, 17, 200)], layer, decode=True)


def test_soft_cap_and_wide_values() -> None:
    rig = Rig(heads=(4, 2), dim=32, v_dim=48)
    rig.run([(0, 50), (32, 17)], rig.layer(logit_cap=5.0, sliding_window_size=20))
    rig.run([(0, 50), (32, 17)], rig.layer())
    rig.run([(31, 1), (99, 1)], rig.layer(logit_cap=5.0), decode=True)


def test_encoder_sees_both_sides() -> None:
    rig = Rig(heads=(4, 4), dim=32)
    rig.run([(0, 50), (0, 3)], rig.layer(attn_type=AttentionType.ENCODER_ONLY))


def _draw(generator: Any, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def test_random_layouts() -> None:
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        draw = partial(_draw, generator)
        rig = Rig(heads=HEADS[draw(0, len(HEADS))], dim=(16, 32, 64)[draw(0, 3)], seed=seed)
        window = (-1, -1, draw(0, 200))[draw(0, 3)]
        parts = [(draw(0, 20) * PAGE, draw(1, 150)) for _ in range(draw(1, 6))]
        rig.run(parts, rig.layer(sliding_window_size=window))
        decodes = [(draw(0, 600), 1) for _ in range(draw(1, 8))]
        rig.run(decodes, rig.layer(sliding_window_size=window), decode=True)


@pytest.mark.parametrize("length", [33, 35, 100, 513, 777])
def test_a_cached_prefix_changes_no_bit(length: int) -> None:
    rig = Rig(heads=(9, 3), dim=64, seed=length)
    slots, scale = rig.place(1, length), rig.dim**-0.5
    query = rig.random(length, 9, 64)
    keys, values = rig.pool.keys[slots], rig.pool.values[slots]

    def chunks(begin: int) -> Any:
        """Rows from ``begin``, in SGLang's default chunks of 512."""
        ends = [*range(begin + 512, length, 512), length]
        parts, masks = [], cpu_kernels.Masks()
        for start, end in itertools.pairwise([begin, *ends]):
            part = query[start:end], keys[:end], values[:end]
            parts.append(cpu_kernels.attend_causal(*part, scale, masks))
        return torch.cat(parts)

    computed = chunks(0)
    # Prefixes that leave at most one chunk: what a cache hit usually leaves.
    for cached in range(max(PAGE, (length - 512) // PAGE * PAGE + PAGE), length, PAGE):
        assert torch.equal(chunks(cached), computed[cached:]), cached


def test_grouping_covers_each_request_once() -> None:
    lengths = [1, 5000, 300, 310, 64, 63, 1, 1024, 1000, 2000]
    groups = cpu_kernels.group_for_decode([torch.arange(length) for length in lengths])
    rows = [row for group in groups for row in group.rows.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group.rows)
        assert group.slots.numel() == len(group.rows) * longest
        if longest > 1024:
            assert group.mask is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "bidirectional"),
        ({"xai_temperature_len": 8}, "temperature"),
        ({"logit_cap": 3.0, "logit_capping_method": "sigmoid"}, "sigmoid"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], reason: str) -> None:
    rig = Rig(heads=(2, 1), dim=16)
    with pytest.raises(NotImplementedError, match=reason):
        rig.run([(0, 4)], rig.layer(**changes))


def test_refuses_unknown_arguments_and_models() -> None:
    rig = Rig(heads=(2, 1), dim=16)
    with pytest.raises(NotImplementedError, match="sinks"):
        rig.backend.forward_extend(
            torch.zeros(1, 32), None, None, rig.layer(), None, sinks=torch.zeros(2)
        )
    for mla, encoder in ((True, False), (False, True)):
        runner = SimpleNamespace(
            use_mla_backend=mla, model_config=SimpleNamespace(is_encoder_decoder=encoder)
        )
        with pytest.raises(NotImplementedError, match=r"no latent|no cross"):
            MemServeCpuAttention(runner)
