"""The event loop of these tests."""

from __future__ import annotations

import asyncio

import pytest


@pytest.fixture(autouse=True)
def plain_event_loop() -> None:
    """Importing SGLang, which tests before these do, makes uvloop every loop's kind. Closing it
    with a TLS server and its clients of one process on it never ends."""
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
