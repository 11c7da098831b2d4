"""Headless Chromium over its DevTools protocol: open a page, ask it things, take its picture."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WAIT_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def installed() -> str:
    """Its path; skips the test where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser here (looked for {', '.join(NAMES)})")


class Reloaded(Exception):
    """The page that was asked is no longer there."""


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []
        """Errors, warnings and policy violations that the page's console showed."""

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), WAIT_S)
            self._listen(message)
            if message.get("id") == self._number:
                if "context" in message.get("error", {}).get("message", ""):
                    raise Reloaded
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _listen(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(str(params["entry"].get("text")))

    async def open(self, url: str) -> None:
        await self.call("Page.enable")
        await self.call("Runtime.enable")
        await self.call("Log.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """Of a JavaScript expression; promises are awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Until it is true; on a page that is still being loaded it is not."""
        tolerant = (
            f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"
        )
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    if await self.value(tolerant):
                        return
                except Reloaded:
                    pass
                await asyncio.sleep(0.05)

    async def theme(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def picture(self, file: Path) -> bytes:
        """The whole page as PNG."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        data = base64.b64decode(shot["data"])
        await asyncio.to_thread(file.write_bytes, data)
        return data


@asynccontextmanager
async def page(folder: Path, width: int = 1440, height: int = 1180) -> AsyncIterator[Page]:
    """A new browser with an empty profile in ``folder``; it ends with the block."""
    arguments = [
        "--headless=new",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        f"--window-size={width},{height}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
    ]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    process = await asyncio.create_subprocess_exec(
        installed(),
        *arguments,
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port = await _port(folder, process)
        async with aiohttp.ClientSession() as http:
            targets = await (await http.get(f"http://127.0.0.1:{port}/json/list")).json()
            [target] = [one for one in targets if one["type"] == "page"]
            url = target["webSocketDebuggerUrl"]
            async with http.ws_connect(url, max_msg_size=2**28) as socket:
                yield Page(socket)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), WAIT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _port(folder: Path, process: asyncio.subprocess.Process) -> int:
    file = folder / "DevToolsActivePort"
    async with asyncio.timeout(WAIT_S):
        while True:
            assert process.returncode is None, f"the browser ended with {process.returncode}"
            if file.exists() and (text := file.read_text()).count("\n"):
                return int(text.splitlines()[0])
            await asyncio.sleep(0.05)
