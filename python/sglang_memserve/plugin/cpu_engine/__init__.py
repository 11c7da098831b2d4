"""The model's own operations on a CPU, native where ``sgl-kernel-ext`` is built.

``register`` is called before a scheduler on the CPU platform builds a model, ``install`` with each
model that is loaded. What they do not know they leave to SGLang; without native code they do
nothing.

    dtypes     element types, torch's and ours
    linears    products of few rows, the head included
    fused_ops  norms, rotary embedding, gated activations
    straight   a whole forward, without SGLang's layers between the ops
"""

from __future__ import annotations

import logging

import torch

from ... import kernels
from . import fused_ops, linears

log = logging.getLogger(__name__)


def register(platform_key: str) -> None:
    """``platform_key``: what our platform's ``get_dispatch_key_name`` says."""
    if kernels.native() is not None:
        fused_ops.register(platform_key)


def install(model: torch.nn.Module) -> None:
    """Let native operations compute what they can of ``model``, in place."""
    native = kernels.native()
    if native is None:
        return
    # Needs SGLang's models, which need its model runner.
    from . import straight

    count = linears.install(model, native)
    problem = straight.install(model, native)
    log.info(
        "native operations: %d linear layers; passes go %s",
        count,
        "straight through" if problem is None else f"layer by layer ({problem})",
    )
