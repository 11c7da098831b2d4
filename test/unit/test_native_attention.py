"""The CPU attention's native side over SGLang's own pools: writes, gates, and equal bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang_memserve.kernels import native  # noqa: E402
from sglang_memserve.plugin.attention import MemServeCpuAttention  # noqa: E402

pytestmark = pytest.mark.skipif(native() is None, reason="no native code")

HEADS, KV_HEADS, DIM, SLOTS = 6, 2, 32, 496


def mha_pool(dtype: Any = torch.bfloat16, kv_dtype: Any = None) -> Any:
    return MHATokenToKVPool(
        size=SLOTS,
        page_size=16,
        dtype=kv_dtype or dtype,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )


def layer(number: int = 0, **changes: Any) -> Any:
    fields = {
        "layer_id": number,
        "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS,
        "qk_head_dim": DIM,
        "v_head_dim": DIM,
        "scaling": DIM**-0.5,
        "logit_cap": 0.0,
        "logit_capping_method": "tanh",
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "attn_type": AttentionType.DECODER,
        "xai_temperature_len": -1,
        "k_scale": None,
        "v_scale": None,
    }
    return SimpleNamespace(**(fields | changes))


def backend_over(pool: Any, table: Any) -> Any:
    return MemServeCpuAttention(
        SimpleNamespace(
            use_mla_backend=False,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            token_to_kv_pool=pool,
        )
    )


class Sequence:
    """One request's random tokens, its slots, and the forward passes that compute some of them."""

    def __init__(self, length: int, dtype: Any = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(length)
        self.length = length
        self.slots = torch.randperm(SLOTS - 1, generator=generator)[:length] + 1
        self.table = torch.zeros(4, 512, dtype=torch.int32)
        self.table[1, :length] = self.slots.int()
        # As the projections of a model leave them: side by side in one row.
        both = torch.randn(length, (HEADS + 2 * KV_HEADS) * DIM, generator=generator).to(dtype)
        self.q, k, v = both.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
        self.k, self.v = k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM)

    def batch(self, start: int, stop: int) -> Any:
        decode = stop - start == 1
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            spec_info=None,
            seq_lens_cpu=torch.tensor([stop]),
            seq_lens=torch.tensor([stop]),
            req_pool_indices=torch.tensor([1]),
            extend_prefix_lens_cpu=[start],
            extend_seq_lens_cpu=[stop - start],
            out_cache_loc=self.slots[start:stop],
        )

    def run(self, backend: Any, which: Any, start: int, stop: int) -> Any:
        batch = self.batch(start, stop)
        backend.init_forward_metadata(batch)
        forward = backend.forward_decode if stop - start == 1 else backend.forward_extend
        rows = slice(start, stop)
        return forward(self.q[rows], self.k[rows], self.v[rows], which, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_written_as_the_pool_would(dtype: Any) -> None:
    sequence, pool, stock = Sequence(100, dtype), mha_pool(dtype), mha_pool(dtype)
    backend = backend_over(pool, sequence.table)
    for start, stop in ((0, 60), (60, 99), (99, 100)):
        sequence.run(backend, layer(1), start, stop)
    assert backend._native.writes(layer(1))
    stock.set_kv_buffer(layer(1), KVWriteLoc(sequence.slots), sequence.k, sequence.v)
    for number in (0, 1):
        assert torch.equal(pool.get_key_buffer(number), stock.get_key_buffer(number))
        assert torch.equal(pool.get_value_buffer(number), stock.get_value_buffer(number))


def test_steps_of_any_size_give_the_same_bits() -> None:
    sequence = Sequence(333)
    whole = sequence.run(backend_over(mha_pool(), sequence.table), layer(), 0, 333)
    backend = backend_over(mha_pool(), sequence.table)
    ends = [7, 8, 64, 65, 200, 201, 202, 332, 333]
    steps = [
        sequence.run(backend, layer(), start, stop)
        for start, stop in zip([0, *ends], ends, strict=False)
    ]
    assert torch.equal(torch.cat(steps), whole)


def test_torch_computes_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = Sequence(40)
    pool = mha_pool(kv_dtype=torch.float8_e5m2)
    backend = backend_over(pool, sequence.table)
    out = sequence.run(backend, layer(), 0, 40)
    assert out.shape == (40, HEADS * DIM) and not backend._native._layers[0].attention

    def fail(*_: Any) -> None:
        raise AssertionError("computed natively")

    monkeypatch.setattr(backend._native, "attend", fail)
    assert sequence.run(backend, layer(), 39, 40).shape == (1, HEADS * DIM)


def test_nothing_is_read_before_its_layer_has_arrived() -> None:
    sequence, pool = Sequence(40), mha_pool()

    class Late(Exception):
        pass

    class Counter:
        waited: list[int]

        def __init__(self) -> None:
            self.waited = []

        def wait_until(self, number: int) -> None:
            self.waited.append(number)
            if number == 1:
                raise Late

    counter = Counter()
    pool.register_layer_transfer_counter(counter)
    backend = backend_over(pool, sequence.table)
    sequence.run(backend, layer(0), 0, 40)
    assert set(counter.waited) == {0}
    with pytest.raises(Late):
        sequence.run(backend, layer(1), 0, 40)
    assert not pool.k_buffer[1].any()


def test_slots_beyond_the_pool_are_refused() -> None:
    sequence, pool = Sequence(40), mha_pool()
    backend = backend_over(pool, sequence.table)
    before = pool.k_buffer[0].clone()
    for slot in (SLOTS + 16, -1, 2**31 - 1):
        sequence.table[1, 3] = slot
        with pytest.raises(IndexError, match="slot"):
            sequence.run(backend, layer(), 10, 40)
        assert torch.equal(pool.k_buffer[0], before)
    sequence.table[1, 3] = sequence.slots[3]
    sequence.slots[20] = SLOTS + 16
    with pytest.raises(IndexError, match="written slot"):
        sequence.run(backend, layer(), 10, 40)
    with pytest.raises(ValueError, match="rows of queries"):
        batch = sequence.batch(0, 10)
        backend.init_forward_metadata(batch)
        backend.forward_extend(sequence.q, sequence.k, sequence.v, layer(), batch, False)


def test_a_pool_for_layers_with_a_window() -> None:
    """Layer 1 has a window, and slots of its own, for recent tokens only."""
    sequence = Sequence(120)
    pool = SWAKVPool(
        size=SLOTS,
        size_swa=SLOTS // 2,
        page_size=16,
        dtype=torch.bfloat16,
        head_num=KV_HEADS,
        head_dim=DIM,
        swa_attention_layer_ids=[1],
        full_attention_layer_ids=[0],
        device="cpu",
    )
    mapping = torch.full((SLOTS + 17,), -1, dtype=torch.int64)
    mapping[sequence.slots[50:]] = torch.arange(1, 71)
    pool.register_mapping(mapping)
    plain = mha_pool()
    windowed = layer(1, sliding_window_size=19)
    right = sequence.run(backend_over(plain, sequence.table), windowed, 0, 120)
    backend = backend_over(pool, sequence.table)
    keys, values = pool.get_key_buffer(1), pool.get_value_buffer(1)
    earlier = mapping[sequence.slots[50:80]]
    keys[earlier], values[earlier] = sequence.k[50:80], sequence.v[50:80]
    got = sequence.run(backend, windowed, 80, 119)
    assert torch.equal(got, right[80:119])
    assert torch.equal(sequence.run(backend, windowed, 119, 120), right[119:])
    assert torch.equal(keys[mapping[sequence.slots[80:]]], sequence.k[80:])
    # The other layer has all tokens' slots, not these.
    sequence.run(backend, layer(0), 80, 120)
    assert torch.equal(pool.get_key_buffer(0)[sequence.slots[80:]], sequence.k[80:])
    with pytest.raises(IndexError):
        sequence.run(backend, layer(1, sliding_window_size=60), 80, 120)
