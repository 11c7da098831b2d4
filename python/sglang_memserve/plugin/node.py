"""One rank of an instance: its MemPool, its transport and its agent thread, built from settings."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_parallel

from ..config import InstanceConfig
from ..errors import ConfigError
from ..mempool import MemPool
from ..transfer.agent import RankAgent
from ..transfer.nixl import NixlTransport
from ..types import Namespace

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

log = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_SAMPLE_BYTES = 4096


def describe_device_pool(server_args: ServerArgs, kv_pool: Any, page_size: int) -> Namespace:
    """The namespace of this rank's pages. Raises ConfigError for a pool we cannot serve."""
    if not isinstance(kv_pool, MHATokenToKVPool):
        raise ConfigError(
            "MemPool serves pools of multi-head and grouped-query attention, "
            f"not {type(kv_pool).__name__}"
        )
    parallel = get_parallel()
    return Namespace(
        model=model_fingerprint(server_args.model_path, server_args.revision),
        weight_version=str(server_args.weight_version),
        kv_dtype=str(kv_pool.dtype).removeprefix("torch."),
        page_size=page_size,
        num_layers=kv_pool.layer_num,
        num_kv_heads=kv_pool.head_num,
        head_dim=kv_pool.head_dim,
        v_head_dim=kv_pool.v_head_dim,
        tp_rank=parallel.tp_rank,
        tp_size=parallel.tp_size,
    )


def model_fingerprint(model_path: str, revision: str | None) -> str:
    """Names the weights, wherever they lie: two copies of one model folder agree.

    A local folder: digest of its config and of name, size and both ends of every weight file (the
    whole files would take seconds per gigabyte). Otherwise the hub name and revision.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        return f"{model_path}@{revision or 'main'}"
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    weights = sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return "weights:" + digest.hexdigest()[:16]


def _keep_to_loopback(host: str) -> None:
    """UCX listens on every interface unless told otherwise; an instance on loopback must not.

    Read when UCX starts. The operator's own choice wins."""
    if host == "localhost" or host.startswith("127.") or host == "::1":
        os.environ.setdefault("UCX_NET_DEVICES", "lo")


@dataclass(frozen=True, slots=True)
class RankNode:
    """``close()`` ends the agent first: nobody may read an arena that is gone."""

    pool: MemPool
    agent: RankAgent

    @classmethod
    def start(
        cls,
        config: InstanceConfig,
        namespace: Namespace,
        more_stats: Callable[[], Mapping[str, float]] = dict,
    ) -> RankNode:
        """``more_stats`` joins what ``/memserve/stats`` says of this rank; called on any thread."""
        _keep_to_loopback(config.peer_host)
        pool = MemPool(
            namespace,
            arena_bytes=config.rank_dram_bytes(namespace.tp_size),
            generation=config.generation,
            eviction=config.mempool_eviction,
            checksums=config.mempool_checksums,
            max_holds=config.limits.max_holds,
            hold_share=config.limits.hold_share,
        )
        try:
            agent = RankAgent(
                pool,
                NixlTransport(f"{config.generation}-{namespace.tp_rank}"),
                namespace=namespace,
                instance_id=config.url,
                generation=config.generation,
                rank=namespace.tp_rank,
                host=config.peer_host,
                local_path=config.rank_socket(namespace.tp_rank),
                more_stats=more_stats,
                limits=config.limits,
            )
            agent.start()
        except BaseException:
            pool.close()
            raise
        log.info(
            "MemPool of rank %d: %d blocks of %d bytes",
            namespace.tp_rank,
            pool.total_blocks,
            namespace.block_bytes,
        )
        return cls(pool, agent)

    def close(self) -> None:
        self.agent.close()
        self.pool.close()
