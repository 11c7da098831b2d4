"""The demo's own reasoning: what it reads out of answers, and when its checks fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sglang_memserve.demo import checks
from sglang_memserve.demo.observe import Observation, engine_report, label_of


def sse(*frames: dict[str, Any]) -> bytes:
    lines = [f"data: {json.dumps(frame)}\n\n" for frame in frames]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def seen(**values: Any) -> Observation:
    defaults: dict[str, Any] = {
        "phase": checks.PROGRAM,
        "label": "a request",
        "status": 200,
        "prefill": "prefill-0",
        "decode": "decode-0",
        "reason": "",
        "prompt_tokens": 100,
        "completion_tokens": 8,
        "cached_tokens": 96,
        "device_tokens": 0,
        "host_tokens": 96,
        "reused_tokens": 0,
        "fetched_bytes": {"prefill-0": 0, "decode-0": 1000},
        "ttft_s": 0.1,
        "seconds": 0.2,
    }
    return Observation(**{**defaults, **values})


def test_report_of_a_generate_answer() -> None:
    meta = {
        "prompt_tokens": 50,
        "completion_tokens": 4,
        "cached_tokens": 48,
        "cached_tokens_details": {"device": 16, "host": 32},
    }
    report = engine_report(json.dumps({"text": "x", "meta_info": meta}).encode())
    assert (report.prompt_tokens, report.completion_tokens, report.cached_tokens) == (50, 4, 48)
    assert (report.device_tokens, report.host_tokens) == (16, 32)


def test_report_of_a_generate_stream_is_the_last_word() -> None:
    first = {"text": "a", "meta_info": {"prompt_tokens": 5, "completion_tokens": 1}}
    last = {"text": "ab", "meta_info": {"prompt_tokens": 5, "completion_tokens": 2}}
    assert engine_report(sse(first, last)).completion_tokens == 2


def test_report_of_a_chat_stream() -> None:
    frames = (
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [], "sglext": {"cached_tokens_details": {"device": 0, "host": 16}}},
        {"choices": [], "sglext": {"input_ids": [1, 2, 3], "output_ids": [[4, 5]]}},
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 20,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 16},
            },
        },
    )
    report = engine_report(sse(*frames))
    assert (report.prompt_tokens, report.cached_tokens, report.host_tokens) == (20, 16, 16)
    assert (report.input_ids, report.output_ids) == ((1, 2, 3), (4, 5))


def test_report_of_an_error_is_empty() -> None:
    assert engine_report(b'{"error": {"message": "no"}}').prompt_tokens == 0
    assert engine_report(b"").prompt_tokens == 0


def test_labels() -> None:
    assert "prefix" in label_of("/generate", {"sampling_params": {"max_new_tokens": 0}})
    text = "A document.\nQuestion: Who?\nAnswer:"
    assert label_of("/generate", {"text": text}) == "fork: Who?"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]
    assert label_of("/v1/chat/completions", {"messages": messages}) == "turn 1: Why?"


@pytest.mark.parametrize(("prompt", "usable"), [(0, 0), (1, 0), (16, 0), (17, 16), (33, 32)])
def test_the_last_token_is_always_computed(prompt: int, usable: int) -> None:
    assert checks.usable_tokens(prompt, 16) == usable


def test_outputs_that_differ_fail() -> None:
    assert checks.same_outputs("n", {"a": "x"}, {"a": "x"}).passed
    failed = checks.same_outputs("n", {"a": "y"}, {"a": "x"})
    assert not failed.passed and "'y' is not 'x'" in failed.detail
    assert not checks.same_outputs("n", {}, {"a": "x"}).passed


def test_a_request_that_failed_or_is_missing_fails() -> None:
    assert checks.every_request_served([seen()], 1).passed
    assert not checks.every_request_served([seen()], 2).passed
    assert not checks.every_request_served([seen(status=503)], 1).passed


def test_nothing_moved_fails() -> None:
    assert checks.kv_moved([seen()], ["decode-0"]).passed
    still = seen(fetched_bytes={"prefill-0": 1000, "decode-0": 0})
    assert not checks.kv_moved([still], ["decode-0"]).passed


def test_a_page_that_decode_computed_fails() -> None:
    assert checks.decode_had_every_page([seen()], 16).passed
    assert not checks.decode_had_every_page([seen(cached_tokens=80)], 16).passed
    # A bypass is not asked for pages, but all bypassed shows nothing.
    assert not checks.decode_had_every_page([seen(prefill=None, cached_tokens=0)], 16).passed


def turn(ids: int, reused: int, output: tuple[int, ...] = (900, 901, 902)) -> Observation:
    return seen(
        prompt_tokens=ids,
        input_ids=tuple(range(ids)),
        output_ids=output,
        reused_tokens=reused,
    )


def test_turns_must_reuse_prompt_and_generated_tokens() -> None:
    # 30 prompt tokens and 4 generated ones that the next prompt repeats: 33 have KV, 32 are pages.
    first = turn(30, 0, output=(30, 31, 32, 33))
    assert checks.later_turns_reused_earlier_ones([first, turn(60, 32)], 16).passed
    # A page may be quicker to compute than to fetch; two are not.
    assert checks.later_turns_reused_earlier_ones([first, turn(60, 16)], 16).passed
    assert not checks.later_turns_reused_earlier_ones([first, turn(60, 15)], 16).passed
    assert not checks.later_turns_reused_earlier_ones([first, turn(60, 0)], 16).passed
    assert not checks.later_turns_reused_earlier_ones([first], 16).passed
    untold = seen(prompt_tokens=60)
    assert not checks.later_turns_reused_earlier_ones([first, untold], 16).passed


def test_repeats_must_be_still() -> None:
    still = {"prefill-0": 0, "decode-0": 0}
    assert checks.repeats_moved_nothing([seen(fetched_bytes=still)], 16).passed
    assert not checks.repeats_moved_nothing([seen()], 16).passed
    assert not checks.repeats_moved_nothing([seen(fetched_bytes=still, cached_tokens=0)], 16).passed
    assert not checks.repeats_moved_nothing([], 16).passed
