"""Certificates of deploy/tls/make-ca, as users make them."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

__all__ = ["make_ca", "trusting"]

SCRIPT = Path(__file__).parents[2] / "deploy" / "tls" / "make-ca"


def make_ca(directory: Path) -> Path:
    """Makes a CA and certificates in this directory, or new certificates where a CA is, and returns the directory."""
    subprocess.run([SCRIPT, directory], check=True, capture_output=True)
    return directory


def trusting(directory: Path) -> ssl.SSLContext:
    """A client's context that trusts the CA in this directory, and nobody else."""
    return ssl.create_default_context(cafile=directory / "ca.pem")
