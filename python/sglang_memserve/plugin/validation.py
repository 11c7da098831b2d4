"""Requests that SGLang 0.5.23 takes and its scheduler does not survive, refused at the door.

An empty prompt, a token id outside the vocabulary and a negative ``logprob_start_len`` each end the
scheduler process on a machine without an accelerator, and with it everybody's requests. One hook
before SGLang's own per-request check turns them into its usual 400.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

CHECK = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"


def register() -> None:
    """Called once, in the HTTP process, before the engine starts."""
    HookRegistry.register(CHECK, before_check, HookType.BEFORE)
    HookRegistry.apply_hooks()


def before_check(manager: Any, request: Any, input_ids: Sequence[int] | None) -> None:
    """``input_ids`` of one prompt. Raises ValueError, which SGLang answers with 400."""
    start = getattr(request, "logprob_start_len", None)
    if isinstance(start, int) and start < -1:
        raise ValueError(f"logprob_start_len must be -1 or more, got {start}")
    if input_ids is None or request.input_embeds is not None or request.contains_mm_input():
        return
    require_computable(input_ids, int(manager.model_config.vocab_size))


def require_computable(input_ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for a prompt that no model of ``vocab_size`` tokens can compute."""
    if not len(input_ids):
        raise ValueError("the prompt is empty: it has no token")
    least, most = min(input_ids), max(input_ids)
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size} tokens")
