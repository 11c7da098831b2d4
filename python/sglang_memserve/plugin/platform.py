"""SGLang on a machine without an accelerator, from the registry's stock wheels.

SGLang's own CPU engine needs a build of ``sgl_kernel`` that no registry carries. This platform
needs only torch: every fused operation takes its ``forward_native`` form. Chosen by
``plugin.activate_platform``; nobody selects it by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from . import ATTENTION_BACKEND

if TYPE_CHECKING:
    # SGLang resolves its platform before almost everything else: nothing else may be imported.
    from sglang.srt.server_args import ServerArgs


class MemServeCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The host's processors as an out-of-tree SGLang device."""

    # Not PlatformEnum.CPU: SGLang takes that for its own CPU engine and its kernels.
    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Only what would otherwise stop a stock launch; the launcher sets the rest as flags."""
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        server_args.disable_overlap_schedule = True

    def init_backend(self) -> None:
        # Runs in schedulers while SGLang imports its model runner.
        from . import attention, cpu_engine, hooks

        attention.register()
        cpu_engine.register(self.get_dispatch_key_name())
        hooks.in_worker()

    def post_load_model(self, model: torch.nn.Module) -> None:
        from . import cpu_engine

        cpu_engine.install(model)

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU
