"""Who may ask what, over which connection: keys, the outermost application, TLS.

Two keys, as in SGLang (``srt.utils.auth``): the API key opens what clients use, the admin key what
operators use. Without an admin key the API key opens that too; without either, everything is open
to whoever reaches the port, which is why the router binds to loopback unless told otherwise.
"""

from __future__ import annotations

import functools
import posixpath
import re
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sglang_memserve.errors import ConfigError
from sglang_memserve.protocol.access import key_for, needs_admin_key
from starlette.middleware.cors import CORSMiddleware

from . import headers as header
from . import replies
from .replies import App, Receive, Scope, Send

ADMIN = "memserve.admin"
"""In an ASGI scope: whether the request came with what opens the operator's routes."""


class Access(Enum):
    """OPEN: probes, and pages without data. CLIENT: the API key. ADMIN: the admin key."""

    OPEN = "open"
    CLIENT = "client"
    ADMIN = "admin"


# Just what the router answers itself, to GET alone: all else may be passed on with its key.
OPEN_PATHS = frozenset(
    {
        *("/health", "/health_generate", "/ready", "/readiness", "/liveness", "/metrics"),
        *("/dashboard", "/dashboard/"),
    }
)
# Scripts and styles hold no data; a browser cannot send a key with a navigation.
OPEN_FILE = re.compile(r"/dashboard/[a-z_-]+\.[a-z]+")
CLIENTS_MEMSERVE = frozenset({"/memserve/tree", "/memserve/explain", "/memserve/models"})
WORKER_PATHS = ("/workers", "/add_worker", "/remove_worker")


@functools.lru_cache(maxsize=1024)
def access_of(method: str, path: str) -> Access:
    """What a request for ``path`` (decoded) needs. Open is one spelling; for all else the
    spellings of a path are one path."""
    if method == "GET" and (path in OPEN_PATHS or OPEN_FILE.fullmatch(path)):
        return Access.OPEN
    # Starlette's routes match a path with one line end behind it too.
    path = "/" + posixpath.normpath(path.removesuffix("\n")).lstrip("/")
    if needs_admin_key(path):
        return Access.ADMIN
    if method not in ("GET", "HEAD") and any(
        path == own or path.startswith(f"{own}/") for own in WORKER_PATHS
    ):
        return Access.ADMIN
    # Membership too: who may name an instance is sent other people's prompts.
    if path.startswith("/memserve/") and path not in CLIENTS_MEMSERVE:
        return Access.ADMIN
    return Access.CLIENT


@dataclass(frozen=True, slots=True)
class Keys:
    """``api``: of clients, and sent to instances. ``admin``: of operators, and sent to instances
    with what SGLang counts as control."""

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)

    @property
    def any(self) -> bool:
        return self.api is not None or self.admin is not None

    def allow(self, access: Access, raw_headers: header.RawHeaders) -> bool:
        if access is Access.OPEN:
            return True
        token = _bearer(raw_headers)
        if self.is_admin(raw_headers):
            return True
        if access is Access.ADMIN and self.admin is not None:
            return False
        return self.api is None or (token is not None and _same(token, self.api))

    def is_admin(self, raw_headers: header.RawHeaders) -> bool:
        """Whether the admin key was set and shown."""
        token = _bearer(raw_headers)
        return self.admin is not None and token is not None and _same(token, self.admin)

    def towards(self, path: str) -> str | None:
        """What an instance is shown with a request for ``path``."""
        return key_for(path, self.api, self.admin)


def _bearer(raw_headers: header.RawHeaders) -> bytes | None:
    scheme, _, token = (header.get(raw_headers, b"authorization") or b"").partition(b" ")
    return token if scheme.lower() == b"bearer" else None


def _same(token: bytes, key: str) -> bool:
    return secrets.compare_digest(token, key.encode())


class Guard:
    """The outermost application: lets in what the keys allow. Plain ASGI."""

    def __init__(self, app: App, keys: Keys) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys.any:
            raw_headers, access = scope["headers"], access_of(scope["method"], scope["path"])
            if not self._keys.allow(access, raw_headers):
                verdict = header.Verdict(header.request_id(raw_headers))
                await replies.unauthorized().send(send, verdict.headers())
                return
            scope[ADMIN] = self._keys.is_admin(raw_headers)
            if scope[ADMIN]:
                # Not for instances: where they want it, it is put in again.
                scope["headers"] = [
                    (name, value) for name, value in raw_headers if name != b"authorization"
                ]
        await self.app(scope, receive, send)


def with_cors(app: App, origins: Sequence[str]) -> App:
    """``app`` for browsers' scripts of other origins too; a preflight needs no key."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[
            "x-request-id",
            "x-memserve-prefill",
            "x-memserve-decode",
            "x-memserve-cached-tokens",
            "x-memserve-reason",
            "retry-after",
        ],
    )


@dataclass(frozen=True, slots=True)
class Tls:
    """Files. ``certfile`` and ``keyfile``: the router's own; with ``ca_certs`` clients need a
    certificate of one of those authorities. ``instance_ca_certs``: who vouches for instances,
    beside nobody else."""

    certfile: str | None = None
    keyfile: str | None = None
    keyfile_password: str | None = field(default=None, repr=False)
    ca_certs: str | None = None
    instance_ca_certs: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for files that are missing or do not belong together: now, not at
        the first handshake."""
        if self.certfile is None and (self.keyfile or self.ca_certs or self.keyfile_password):
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        try:
            if self.certfile is not None:
                self.server_context()
            self.instance_context()
        except (OSError, ValueError) as error:
            raise ConfigError(f"TLS: {_reason(error, self)}") from error

    @property
    def scheme(self) -> str:
        return "http" if self.certfile is None else "https"

    def server_context(self) -> ssl.SSLContext:
        """Of a router with a certificate."""
        assert self.certfile is not None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.ca_certs)
        # An empty password is asked for by nobody: OpenSSL would read the terminal otherwise.
        context.load_cert_chain(self.certfile, self.keyfile, self.keyfile_password or "")
        if self.ca_certs is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def instance_context(self) -> ssl.SSLContext | None:
        """For connections to instances; None: the system's authorities."""
        if self.instance_ca_certs is None:
            return None
        return ssl.create_default_context(cafile=self.instance_ca_certs)

    def uvicorn_options(self) -> dict[str, Any]:
        """``uvicorn.Config``'s arguments."""
        if self.certfile is None:
            return {}
        return {
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_keyfile_password": self.keyfile_password or "",
            "ssl_ca_certs": self.ca_certs,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.ca_certs else ssl.CERT_NONE,
        }


def _reason(error: Exception, tls: Tls) -> str:
    files = [tls.certfile, tls.keyfile, tls.ca_certs, tls.instance_ca_certs]
    listed = ", ".join(file for file in files if file)
    return f"{error.strerror if isinstance(error, OSError) else error} ({listed})"
