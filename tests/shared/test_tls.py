"""TLS to a real NATS server, with the certificates of deploy/tls/make-ca and the configuration of deploy/nats."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.support.ca import make_ca
from tests.support.nats import NatsServer, nats_executable, nats_server

from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.settings import CommonSettings, SettingsError
from trunkline.shared.tls import serving_context, tls_context

DEPLOY = Path(__file__).parents[2] / "deploy"
SECRET = "geheim"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ca(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def configuration(made: Path, tmp_path: Path) -> Path:
    text = (DEPLOY / "nats" / "tls-on.conf").read_text().replace("/etc/nats/certificates", str(made))
    path = tmp_path / "nats.conf"
    path.write_text(text + f'authorization {{ user: edge, password: "{SECRET}" }}\n')
    return path


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


async def connect(server: NatsServer, **settings: Any) -> None:
    """Connects as a role does, and ends again. Raises what `Bus.start` raises."""
    url = server.url.replace("nats://", settings.pop("scheme", "nats") + "://")
    common = CommonSettings(nats_url=url, nats_user="edge", nats_password=SecretStr(SECRET), **settings)
    bus = Bus(common, "test", "one", lambda error: None, connect_timeout_s=2.0)
    try:
        await bus.start()
    finally:
        await bus.stop()


async def test_whoever_trusts_the_ca_connects(made: Path, configuration: Path) -> None:
    async with nats_server("-c", str(configuration)) as server:
        await connect(server, nats_ca=made / "ca.pem")


async def test_new_certificates_need_no_new_trust(made: Path, tmp_path: Path, configuration: Path) -> None:
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes((made / "ca.pem").read_bytes())
    before = (made / "nats.pem").read_bytes()
    make_ca(made)
    assert (made / "nats.pem").read_bytes() != before
    async with nats_server("-c", str(configuration)) as server:
        await connect(server, nats_ca=trusted)


@pytest.mark.parametrize("trust", ["another CA", "the system's"])
async def test_certificate_of_a_stranger_is_refused_with_what_to_do(
    trust: str, made: Path, configuration: Path, tmp_path: Path
) -> None:
    ca = {"nats_ca": make_ca(tmp_path / "other") / "ca.pem"} if trust == "another CA" else {"scheme": "tls"}
    async with nats_server("-c", str(configuration)) as server:
        with pytest.raises(TrunklineError, match="TRUNKLINE_NATS_CA must name the CA") as refused:
            await connect(server, **ca)
    assert SECRET not in str(refused.value)


async def test_name_of_the_server_counts(made: Path, configuration: Path, tmp_path: Path) -> None:
    rewrite(configuration, "/nats.", "/client.")
    async with nats_server("-c", str(configuration)) as server:
        with pytest.raises(TrunklineError, match="TRUNKLINE_NATS_CA must name the CA"):
            await connect(server, nats_ca=made / "ca.pem")


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_server_without_tls_never_gets_the_password(scheme: str, made: Path, tmp_path: Path) -> None:
    """nats-py goes on without TLS when the server, or whoever pretends to be it, says that there is none."""
    (tmp_path / "nats.conf").write_text('authorization { user: edge, password: "another" }\n')
    async with nats_server("-c", str(tmp_path / "nats.conf")) as server:
        with pytest.raises(TrunklineError, match="offers no TLS, which the settings demand"):
            await connect(server, scheme=scheme, nats_ca=made / "ca.pem")
        assert "authentication error" not in server.log


async def test_server_that_asks_for_a_certificate_gets_it(made: Path, configuration: Path) -> None:
    rewrite(configuration, "timeout: 5", "timeout: 5, verify: true")
    async with nats_server("-c", str(configuration)) as server:
        pair = {"nats_certificate": made / "client.pem", "nats_key": made / "client.key"}
        await connect(server, nats_ca=made / "ca.pem", **pair)
        with pytest.raises(TrunklineError, match="no NATS server"):
            await connect(server, nats_ca=made / "ca.pem")


@pytest.mark.parametrize(
    ("context_of", "files", "told"),
    [
        (tls_context, {"nats_ca": "missing.pem"}, "nats_ca .*missing.pem cannot be read: No such file"),
        (tls_context, {"nats_certificate": "client.pem"}, "nats_certificate and nats_key go together"),
        (tls_context, {"nats_certificate": "client.pem", "nats_key": "nats.key"}, "are no pair"),
        (
            tls_context,
            {"nats_certificate": "client.pem", "nats_key": "missing.key"},
            "missing.key cannot be read",
        ),
        (tls_context, {"nats_ca": "ca.key"}, "nats_ca .*ca.key is no file of certificates"),
        (serving_context, {"tls_key": "role.key"}, "tls_certificate and tls_key go together"),
        (serving_context, {"tls_certificate": "role.pem", "tls_key": "nats.key"}, "tls_certificate .* are no pair"),
    ],
)
def test_files_that_cannot_work_are_told(
    made: Path, context_of: Callable[[CommonSettings], object], files: dict[str, str], told: str
) -> None:
    paths: dict[str, Any] = {name: made / file for name, file in files.items()}
    settings = CommonSettings(**paths)
    with pytest.raises(SettingsError, match=told):
        context_of(settings)


def test_without_certificates_there_is_no_tls() -> None:
    assert tls_context(CommonSettings()) is serving_context(CommonSettings()) is None


@pytest.mark.parametrize("tls", ["off", "on"])
def test_configuration_of_the_cluster_is_valid(tls: str, made: Path, tmp_path: Path) -> None:
    for name in ("nats.conf", "users.conf"):
        (tmp_path / name).write_text((DEPLOY / "nats" / name).read_text())
    text = (DEPLOY / "nats" / f"tls-{tls}.conf").read_text()
    (tmp_path / "tls.conf").write_text(text.replace("/etc/nats/certificates", str(made)))
    roles = ("EDGE", "WORKERS", "SUBSCRIPTIONS", "PUBLISHER", "ADMIN", "ROUTES")
    environment = {f"NATS_{role}_PASSWORD": "secret" for role in roles}
    environment |= {"NATS_NODE": "nats-1", "NATS_ROUTES": "[nats://routes:secret@nats-1:6222]"}
    command = [nats_executable(), "-c", str(tmp_path / "nats.conf"), "-t"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
