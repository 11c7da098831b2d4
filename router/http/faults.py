"""What went wrong on the way to an instance, in a sentence: for clients, operators and the log."""

from __future__ import annotations

import os
import ssl

import aiohttp


def plainly(error: Exception) -> str:
    """Without the HTTP library's own words. ``error``: what it or a socket raised."""
    if isinstance(error, TimeoutError):
        return f"no answer in time ({str(error) or 'deadline'})"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted: {_tls(error.certificate_error)}"
    if isinstance(error, aiohttp.ClientConnectorError):
        host = f"[{error.host}]" if ":" in error.host else error.host
        return f"cannot connect to {host}:{error.port}: {_why(error.os_error)}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "connection broke before an answer"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "connection broke in the middle of the answer"
    if isinstance(error, aiohttp.ClientResponseError):
        return "connection broke: the answer is no HTTP"
    if isinstance(error, OSError):
        return f"connection broke: {_why(error)}"
    return str(error) or type(error).__name__


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return _tls(error)
    # Name look-ups have numbers of their own, and those are negative.
    if error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def _tls(error: Exception) -> str:
    said = getattr(error, "verify_message", "") or getattr(error, "reason", "")
    return str(said or error)
