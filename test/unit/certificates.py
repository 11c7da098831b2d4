"""Certificates for tests, made by the ``openssl`` command: an authority and what it signs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NEW = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"


@dataclass(frozen=True)
class Identity:
    certfile: str
    keyfile: str
    ca_certs: str


class Authority:
    """Its files lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key, self._cert = str(folder / "ca.key"), str(folder / "ca.pem")
        _openssl(
            f"{NEW} -subj /CN=test -addext keyUsage=critical,keyCertSign "
            f"-keyout {self._key} -out {self._cert}"
        )

    def issue(self, name: str) -> Identity:
        """A certificate for a host name or, where it looks like one, an IPv4 address."""
        key, cert = str(self._folder / f"{name}.key"), str(self._folder / f"{name}.pem")
        kind = "IP" if name.replace(".", "").isdigit() else "DNS"
        _openssl(
            f"{NEW} -subj /CN={name} -addext subjectAltName={kind}:{name} "
            f"-addext basicConstraints=critical,CA:FALSE "
            f"-CA {self._cert} -CAkey {self._key} -keyout {key} -out {cert}"
        )
        return Identity(cert, key, self._cert)


def _openssl(arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")
    subprocess.run(
        ["openssl", *arguments.split()], check=True, capture_output=True, timeout=60, text=True
    )
