"""The bytes of one block: one page over all layers, K and V together, contiguous.

    block   = layer 0 | layer 1 | ... | layer L-1
    layer   = K | V
    K       = [page_size, heads, head_dim]      V = [page_size, heads, v_head_dim]

With equal head dimensions a block is the array ``[L, 2, page_size, heads, head_dim]``. One network
descriptor moves a page (MemServe paper, section 5.2: block aggregation).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..types import DTYPE_BYTES, Namespace


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Sizes and offsets in bytes unless the name says otherwise."""

    num_layers: int
    page_size_tokens: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    element_bytes: int

    @classmethod
    def of(cls, namespace: Namespace) -> BlockLayout:
        """Raises ConfigError for an unknown dtype and for sizes that are not positive."""
        if namespace.kv_dtype not in DTYPE_BYTES:
            known = ", ".join(sorted(DTYPE_BYTES))
            raise ConfigError(f"KV dtype {namespace.kv_dtype!r} is not supported; known: {known}")
        layout = cls(
            num_layers=namespace.num_layers,
            page_size_tokens=namespace.page_size,
            num_kv_heads=namespace.num_kv_heads,
            head_dim=namespace.head_dim,
            v_head_dim=namespace.v_head_dim,
            element_bytes=DTYPE_BYTES[namespace.kv_dtype],
        )
        for name in ("num_layers", "page_size_tokens", "num_kv_heads", "head_dim", "v_head_dim"):
            if getattr(layout, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(layout, name)}")
        assert layout.block_bytes == namespace.block_bytes, (layout, namespace)
        return layout

    @property
    def k_bytes(self) -> int:
        """K of one page in one layer."""
        return self.page_size_tokens * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def v_bytes(self) -> int:
        """V of one page in one layer."""
        return self.page_size_tokens * self.num_kv_heads * self.v_head_dim * self.element_bytes

    @property
    def layer_bytes(self) -> int:
        return self.k_bytes + self.v_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def k_offset(self, layer: int) -> int:
        """Where K of ``layer`` begins within a block."""
        assert 0 <= layer < self.num_layers, layer
        return layer * self.layer_bytes

    def v_offset(self, layer: int) -> int:
        return self.k_offset(layer) + self.k_bytes
