"""The first requests of a process, sent before anybody else's.

On a CPU the first product of each shape builds its kernel, so the first prompt of a process takes
many times as long as the second one.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from typing import Any

import requests
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 600.0
# Tokens: several pages over a chunk, a prompt of one page, and the tail after a prefix hit.
_PROMPT_LENGTHS = (600, 32, 600)
_NEW_TOKENS = 4
# Apart from every real prompt, should a page outlive the flush.
_NAMESPACE = "memserve-warm-up"


class Outcome(Enum):
    DONE = "done"
    NOT_TEXT = "the model generates no text from plain token ids"
    FAILED = "failed"


def warm_up(server_args: ServerArgs) -> Outcome:
    """Compute a few prompts and forget them. The reason of a failure is in the log."""
    url = server_args.url()
    key = server_args.admin_api_key or server_args.api_key
    started = time.monotonic()
    with requests.Session() as session:
        if key:
            session.headers["Authorization"] = f"Bearer {key}"
        session.verify = server_args.ssl_ca_certs or not server_args.ssl_certfile
        try:
            info = _wait_for_model_info(session, url)
            if not info["is_generation"] or info.get("has_image_understanding"):
                return Outcome.NOT_TEXT
            _compute_prompts(session, url, int(info.get("max_req_input_len") or 0))
        except (requests.RequestException, TimeoutError, ValueError, KeyError) as error:
            logger.error("warm-up failed: %s", error)
            return Outcome.FAILED
    logger.info("warm-up took %.1f s", time.monotonic() - started)
    return Outcome.DONE


def _wait_for_model_info(session: requests.Session, url: str) -> dict[str, Any]:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            response = session.get(f"{url}/model_info", timeout=5)
            if response.status_code == 200:
                info: dict[str, Any] = response.json()
                return info
            problem = f"{url}/model_info answers {response.status_code}"
        except requests.ConnectionError:
            problem = f"{url} does not listen"
        if time.monotonic() > deadline:
            raise TimeoutError(problem)
        time.sleep(0.2)


def _compute_prompts(session: requests.Session, url: str, longest: int) -> None:
    for length in _PROMPT_LENGTHS:
        if longest and length + _NEW_TOKENS >= longest:
            continue
        body = {
            # Small ids exist in every vocabulary.
            "input_ids": [3 + position % 61 for position in range(length)],
            "sampling_params": {
                "max_new_tokens": _NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            },
            "extra_key": _NAMESPACE,
        }
        session.post(f"{url}/generate", json=body, timeout=_REQUEST_TIMEOUT_S).raise_for_status()
    if not session.post(f"{url}/flush_cache", timeout=_REQUEST_TIMEOUT_S).ok:
        # Somebody's request came before we were ready; these pages will be evicted in time.
        logger.info("the warm-up's pages stay cached because requests are running already")
