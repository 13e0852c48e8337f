"""The edge's settings: defaults, what goes together, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.edge.settings import EdgeSettings, normal_origin
from trunkline.shared.settings import SettingsError, print_settings

SECRET = "s" * 32


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: what lies about on the machine is no part of a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(**arguments: str) -> EdgeSettings:
    return EdgeSettings.load(arguments)


def refusal(**arguments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(**arguments)
    return str(caught.value)


def test_tokens_are_the_default_and_need_a_key() -> None:
    text = refusal()
    for way_out in ("auth (default)", "TRUNKLINE_EDGE_JWT_SECRET", "TRUNKLINE_EDGE_JWKS_URL", "--auth none"):
        assert way_out in text


@pytest.mark.parametrize(
    "arguments", [{"jwt_secret": SECRET}, {"jwks_url": "https://issuer.example/keys"}, {"auth": "none"}]
)
def test_any_key_or_none_at_all_will_do(arguments: dict[str, str]) -> None:
    assert load(**arguments).port == 8080


@pytest.mark.parametrize("secret", ["s" * 31, "ü" * 15])
def test_short_secret_is_refused_and_not_shown(secret: str) -> None:
    text = refusal(jwt_secret=secret)
    assert "jwt_secret (argument): too short" in text
    assert secret not in text
    assert "auth" not in text, "one mistake, one line"


def test_secret_is_measured_in_bytes() -> None:
    assert load(jwt_secret="ü" * 16).jwt_secret is not None


@pytest.mark.parametrize("url", ["issuer.example/keys", "file:///etc/passwd", "https://", "http://[::1", "http://a:99999/"])
def test_jwks_url_is_an_address_of_the_web(url: str) -> None:
    text = refusal(jwks_url=url)
    assert "jwks_url (argument): not an http:// or https:// URL" in text
    assert "auth" not in text


def test_origins_are_made_normal() -> None:
    settings = load(auth="none", allowed_origins="HTTPS://Example.com:443, http://localhost:3000,*")
    assert settings.allowed_origins == ["https://example.com", "http://localhost:3000", "*"]


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://example.com/app", "https://*@a", "null"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    assert "allowed_origins.0 (argument): an origin is scheme://host" in refusal(auth="none", allowed_origins=origin)


@pytest.mark.parametrize(
    ("origin", "normal"),
    [
        ("http://a:80", "http://a"),
        ("http://a:443", "http://a:443"),
        ("https://[::1]:443", "https://[::1]"),
        ("chrome-extension://abc", "chrome-extension://abc"),
        ("null", None),
        ("", None),
        ("://a", None),
        ("https://", None),
        ("https://a?b", None),
        ("https://a#b", None),
        ("https://a@b", None),
        ("https://a b", None),
    ],
)
def test_normal_origin(origin: str, normal: str | None) -> None:
    assert normal_origin(origin) == normal


@settings(deadline=None)
@given(st.text())
def test_normal_origin_of_anything_is_normal(text: str) -> None:
    normal = normal_origin(text)
    assert normal is None or normal_origin(normal) in (normal, normal.removesuffix(":80"), normal.removesuffix(":443"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("edge_id", "a.b"),
        ("edge_id", ""),
        ("connections", "0"),
        ("outbox_bytes", "1"),
        ("ping_s", "0"),
        ("coalesce_s", "-1"),
        ("static_dir", "missing"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: str) -> None:
    if value:
        assert f"{name} (argument)" in refusal(auth="none", **{name: value})
    else:
        assert load(auth="none", **{name: value}).source(name) == "default"


def test_environment(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_AUTH", "none")
    monkeypatch.setenv("TRUNKLINE_EDGE_STATIC_DIR", str(directory))
    monkeypatch.setenv("TRUNKLINE_EDGE_REUSE_PORT", "true")
    settings = EdgeSettings.load()
    assert (settings.auth, settings.static_dir, settings.reuse_port) == ("none", directory, True)


def test_printed_settings_hide_the_secret() -> None:
    text = print_settings(load(jwt_secret=SECRET))
    assert SECRET not in text
    assert "# jwt_secret = ***" in text
