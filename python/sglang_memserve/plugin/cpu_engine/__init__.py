"""The model's own operations on a CPU, native where ``sgl-kernel-ext`` is built.

``install`` is called with each model that a scheduler on the CPU platform has loaded. What it does
not know it leaves to SGLang; without native code it does nothing.

    dtypes     element types, torch's and ours
    linears    products of few rows, the head included
"""

from __future__ import annotations

import logging

import torch

from ... import kernels
from . import linears

log = logging.getLogger(__name__)


def install(model: torch.nn.Module) -> None:
    """Let native operations compute what they can of ``model``, in place."""
    native = kernels.native()
    if native is None:
        return
    count = linears.install(model, native)
    log.info("native operations: %d linear layers", count)
