"""The first requests of a process, sent before anybody else's.

On a CPU the first product of each shape builds its kernel, so the first prompt of a process takes
many times as long as the second one.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase
from sglang.srt.server_args import ServerArgs

from ..errors import MemServeError
from ..protocol.access import key_for, needs_admin_key

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
    started = time.monotonic()
    with requests.Session() as session:
        session.auth = _Keys(server_args.api_key, server_args.admin_api_key)
        session.verify = server_args.ssl_ca_certs or not server_args.ssl_certfile
        try:
            info = _wait_for_model_info(session, url)
            if not info["is_generation"] or info.get("has_image_understanding"):
                return Outcome.NOT_TEXT
            _compute_prompts(session, url, int(info.get("max_req_input_len") or 0))
        except (_Refused, requests.RequestException, TimeoutError, ValueError, KeyError) as error:
            logger.error("warm-up failed: %s", error)
            return Outcome.FAILED
    logger.info("warm-up took %.1f s", time.monotonic() - started)
    return Outcome.DONE


class _Refused(MemServeError):
    """Our own server does not let us in: waiting would not help."""


class _Keys(AuthBase):
    """Each route is shown the key that it asks for."""

    def __init__(self, api: str | None, admin: str | None) -> None:
        self._api = api
        self._admin = admin

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        key = key_for(urlsplit(request.url or "").path, self._api, self._admin)
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request


def _require_let_in(response: requests.Response) -> requests.Response:
    """Raises _Refused."""
    if response.status_code in (401, 403):
        path = urlsplit(response.url).path
        raise _Refused(
            f"{path} answers {response.status_code} to this server's own "
            f"{'--admin-api-key' if needs_admin_key(path) else '--api-key'}"
        )
    return response


def _wait_for_model_info(session: requests.Session, url: str) -> dict[str, Any]:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            response = _require_let_in(session.get(f"{url}/model_info", timeout=5))
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
        answer = session.post(f"{url}/generate", json=body, timeout=_REQUEST_TIMEOUT_S)
        _require_let_in(answer).raise_for_status()
    if not _require_let_in(session.post(f"{url}/flush_cache", timeout=_REQUEST_TIMEOUT_S)).ok:
        # Somebody's request came before we were ready; these pages will be evicted in time.
        logger.info("the warm-up's pages stay cached because requests are running already")
