"""How far a process of the cluster has come, asked over HTTP. Never raises, never waits long."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from enum import Enum
from http.client import HTTPException

_TIMEOUT_S = 2.0
# Straight to 127.0.0.1, whatever proxy the environment names.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Stage(Enum):
    """In the order in which they are passed."""

    STARTING = "starting"
    WARMING_UP = "loading model, warming up"
    UP = "up, registering"
    READY = "ready"
    DEAD = "dead"


def get(url: str, api_key: str | None = None) -> tuple[int, bytes]:
    """Status and body; status 0 when nothing answered in time."""
    request = urllib.request.Request(url)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with _direct.open(request, timeout=_TIMEOUT_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (OSError, HTTPException):
        return 0, b""


def instance_stage(url: str) -> Stage:
    """What an instance says of itself. Whether the router uses it is the router's to say."""
    status, _ = get(f"{url}/health")
    if status == 200:
        return Stage.UP
    return Stage.WARMING_UP if status else Stage.STARTING


def ready_workers(router_url: str, api_key: str | None = None) -> set[str]:
    """URLs of the instances that the router sends requests to."""
    status, body = get(f"{router_url}/workers", api_key)
    if status != 200:
        return set()
    try:
        workers = json.loads(body)["workers"]
        return {str(worker["url"]) for worker in workers if worker["state"] == "ready"}
    except (ValueError, KeyError, TypeError):
        return set()


def router_ready(router_url: str) -> bool:
    """Whether a request would be served: there is one to prefill and one to decode."""
    return get(f"{router_url}/readiness")[0] == 200


def router_answers(router_url: str) -> bool:
    return get(f"{router_url}/liveness")[0] == 200
