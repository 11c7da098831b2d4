"""Device pools of random bytes, and what a block must hold of a page: obviously right loops."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from sglang_memserve.memory.copies.base import PoolTensors
from sglang_memserve.memory.layout import BlockLayout

DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class PagedPool:
    """``k[l]``, ``v[l]``: ``[slots, heads, dim]``, with room for ``pages`` whole pages."""

    layout: BlockLayout
    pages: int
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @classmethod
    def random(
        cls, layout: BlockLayout, pages: int, seed: int, device: str = "cpu", lead: int = 0
    ) -> PagedPool:
        """``lead``: elements of each storage that lie before its tensor, so that it starts at an
        odd address."""
        source = torch.Generator().manual_seed(seed)
        # Some slots more than whole pages have: SGLang's pools are like that.
        slots = pages * layout.page_size_tokens + (layout.page_size_tokens > 1)

        def buffer(dim: int) -> torch.Tensor:
            count = lead + slots * layout.num_kv_heads * dim
            size = (count * layout.element_bytes,)
            raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=source).to(device)
            elements = raw.view(DTYPES[layout.element_bytes])
            return elements[lead:].view(slots, layout.num_kv_heads, dim)

        k = [buffer(layout.head_dim) for _ in range(layout.num_layers)]
        v = [buffer(layout.v_head_dim) for _ in range(layout.num_layers)]
        return cls(layout, pages, k, v)

    def tensors(self) -> PoolTensors:
        return PoolTensors(self.layout, self.k, self.v)

    def layer_of(self, page: int, layer: int) -> bytes:
        """What a block holds of one layer of ``page``: K, then V."""
        size = self.layout.page_size_tokens
        slots = slice(page * size, (page + 1) * size)
        return b"".join(
            bytes(buffer[layer][slots].cpu().contiguous().view(torch.uint8).numpy())
            for buffer in (self.k, self.v)
        )

    def block_of(self, page: int) -> bytes:
        return b"".join(self.layer_of(page, layer) for layer in range(self.layout.num_layers))

    def blocks(self) -> list[bytes]:
        return [self.block_of(page) for page in range(self.pages)]


def random_layout(source: random.Random) -> BlockLayout:
    """Small, and often of sizes that no vector instruction likes."""
    return BlockLayout(
        num_layers=source.randint(1, 4),
        page_size_tokens=source.choice([1, 2, 4, 16]),
        num_kv_heads=source.randint(1, 3),
        head_dim=source.choice([1, 3, 8, 16]),
        v_head_dim=source.choice([1, 4, 8, 16]),
        element_bytes=source.choice([1, 2, 4]),
    )
