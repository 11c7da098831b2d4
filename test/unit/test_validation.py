"""Requests that end a scheduler are refused in SGLang's own words for a client's mistake."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang_memserve.plugin.validation import before_check

MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=300))


def request(media: bool = False, **fields: Any) -> Any:
    return SimpleNamespace(
        **{"input_embeds": None, "logprob_start_len": -1, **fields}, contains_mm_input=lambda: media
    )


@pytest.mark.parametrize(
    ("ids", "fields", "word"),
    [
        ([], {}, "empty"),
        ([5, -1], {}, "-1"),
        ([5, 300], {}, "vocabulary of 300"),
        ([5], {"logprob_start_len": -5}, "logprob_start_len"),
    ],
)
def test_refused(ids: list[int], fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        before_check(MANAGER, request(**fields), ids)


def test_taken() -> None:
    before_check(MANAGER, request(), [0, 299])
    before_check(MANAGER, request(logprob_start_len=0), [1])
    # What stands for an image, or for embeddings, is in no vocabulary.
    before_check(MANAGER, request(media=True), [10**6])
    before_check(MANAGER, request(input_embeds=[[0.0]]), None)
