"""How an instance that is not there describes itself to a router."""

from __future__ import annotations

from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import InstanceInfo, RankInfo
from sglang_memserve.types import Namespace

PAGE = 16
NAMESPACE = Namespace("m", "w", "bfloat16", PAGE, 1, 1, 64, 64, 0, 1)
# Port 9 (discard): nobody publishes or answers there.
NOBODY = "tcp://127.0.0.1:9"


def instance_info(
    url: str, generation: str, role: str, model_path: str = "/models/m"
) -> InstanceInfo:
    return InstanceInfo(
        protocol=1,
        url=url,
        generation=generation,
        role=role,
        model_path=model_path,
        served_model_name="m",
        layout_hash=layout_hash(NAMESPACE),
        namespace=NAMESPACE,
        page_size=PAGE,
        context_length=100_000,
        max_total_tokens=1_000_000,
        events_address=NOBODY,
        ranks=[RankInfo(0, NOBODY, NOBODY, 10, NAMESPACE.block_bytes)],
    )
