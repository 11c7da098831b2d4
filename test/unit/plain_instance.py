"""A profile whose figures can be added up by hand."""

from __future__ import annotations

from sglang_memserve.router.simulate.profile import Decode, Link, Prefill, Profile

PLAIN = Profile(
    name="plain",
    model="m",
    source="invented",
    estimates=[],
    kv_bytes_per_token=100,
    hbm_tokens=10_000,
    dram_bytes=10_000_000,
    load_bytes_per_s=1e9,
    hop_s=0.0,
    prefill=Prefill(fixed_s=0.5, token_s=0.01, pair_s=0.0, chunk_tokens=100),
    decode=Decode(fixed_s=1.0, stream_s=0.0, context_token_s=0.0, max_streams=8),
    link=Link(latency_s=0.0, bytes_per_s=1000.0),
)
