"""What plugs MemServe into SGLang. The only package that imports ``sglang``.

``compat``      every SGLang symbol touched, and the version they were taken from
``platform``    the CPU platform
``attention``   the CPU attention backend
``cpu_engine``  the other operations of a model on a CPU
``hooks``       the few functions of SGLang that are wrapped
``flags``       what we read of SGLang's flags, refuse and add
``boot``        SGLang's server started with MemServe on it
``warmup``      the first requests, before anybody else's
``linker``      MemPool behind the unified cache (one a rank)
``agent``       registration and heartbeats (one an instance)
``validation``  requests that would end a scheduler, refused
``routes``      ``/memserve/*`` on SGLang's own app

SGLang calls the two functions below in every process it starts, with or without MemServe, so this
module imports nothing heavy.
"""

from __future__ import annotations

import os

PLATFORM_NAME = "memserve_cpu"
"""Our entry point's name in the group ``sglang.srt.platforms``."""

PLATFORM_CLASS = "sglang_memserve.plugin.platform.MemServeCpuPlatform"

ATTENTION_BACKEND = "memserve_cpu"
"""Our name in SGLang's registry of attention backends."""

BUILTIN_CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"


def activate_platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: our CPU platform, or None to stay out of the way.

    None wherever SGLang knows an accelerator of this machine, and where the operator asked for
    SGLang's own CPU engine.
    """
    if os.environ.get(BUILTIN_CPU_ENGINE, "0") == "1" or has_accelerator():
        return None
    return PLATFORM_CLASS


def has_accelerator() -> bool:
    """Whether SGLang would pick a device of its own here (its own order of questions)."""
    import torch

    npu = getattr(torch, "npu", None)
    return bool(
        torch.cuda.is_available()
        or torch.xpu.is_available()
        or torch.backends.mps.is_available()
        or getattr(torch.version, "musa", None) is not None
        or (npu is not None and npu.is_available())
    )


def register() -> None:
    """Entry point ``sglang.srt.plugins``: runs in every process of SGLang.

    Does nothing unless our platform is active or the launcher asked for it, so that stock SGLang
    on a machine with an accelerator stays stock.
    """
    from . import hooks

    hooks.register()
