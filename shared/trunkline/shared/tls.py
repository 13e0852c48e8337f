"""TLS: to NATS, what is trusted, what is shown, and no way around it; for what a process serves, what it shows."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import nats.errors

from trunkline.shared.client import DirectClient
from trunkline.shared.settings import CommonSettings, SettingsError

__all__ = ["TlsClient", "serving_context", "tls_advice", "tls_context"]


def tls_context(settings: CommonSettings) -> ssl.SSLContext | None:
    """Returns how to speak TLS with NATS, or None when the settings do not demand it. Raises `SettingsError`."""
    demanded = any(server.startswith("tls://") for server in settings.nats_servers)
    if not demanded and settings.nats_ca is None and settings.nats_certificate is None:
        return None
    ca = _readable("nats_ca", settings.nats_ca)
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise SettingsError(f"nats_ca {ca} is no file of certificates (PEM)") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _show(context, settings, "nats_certificate", "nats_key")
    return context


def serving_context(settings: CommonSettings) -> ssl.SSLContext | None:
    """Returns how a process serves TLS, or None when it has no certificate. Raises `SettingsError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context if _show(context, settings, "tls_certificate", "tls_key") else None


def tls_advice(error: BaseException) -> str:
    """Says what to do about an error of a connection, if it has to do with TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "; the server's certificate is not to be trusted: TRUNKLINE_NATS_CA must name the CA that has signed it, and "
            "TRUNKLINE_NATS_URL the servers as it names them"
        )
    if isinstance(error, ssl.SSLError):
        return "; if the server asks for a certificate, set TRUNKLINE_NATS_CERTIFICATE and TRUNKLINE_NATS_KEY"
    return ""


class TlsClient(DirectClient):
    """A client that never speaks without TLS: nats-py would, and send its password, to whoever says that TLS is off."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and not info.get("tls_required"):
            raise nats.errors.Error("the server offers no TLS, which the settings demand: turn it on there, or off here")
        await super()._process_info(info, initial_connection)


def _show(context: ssl.SSLContext, settings: CommonSettings, certificate_name: str, key_name: str) -> bool:
    """Has the other side shown the certificate of two settings, if they are set: whether they are."""
    certificate = _readable(certificate_name, getattr(settings, certificate_name))
    key = _readable(key_name, getattr(settings, key_name))
    if certificate is None and key is None:
        return False
    if certificate is None or key is None:
        raise SettingsError(f"{certificate_name} and {key_name} go together: set both, or none")
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise SettingsError(f"{certificate_name} {certificate} and {key_name} {key} are no pair: {error.reason}") from None
    return True


def _readable(name: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        with path.open("rb"):
            return str(path)
    except OSError as error:
        raise SettingsError(f"{name} {path} cannot be read: {error.strerror}") from None
