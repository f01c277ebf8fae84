"""Settings come from VOICEPOOL_* variables, and a wrong one is told in words."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest

from voicepool import logs
from voicepool.settings import GatewaySettings, OperatorSettings, Settings, SettingsError

KEY = {"VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE": "/etc/voicepool/public.pem"}


def test_defaults() -> None:
    settings = OperatorSettings.from_environment(KEY)
    assert settings.assignment_public_key_file == Path("/etc/voicepool/public.pem")
    assert settings.namespace is None
    assert settings.health_port == 8081


def test_values_are_read_and_empty_ones_count_as_not_set() -> None:
    settings = OperatorSettings.from_environment(
        KEY | {"VOICEPOOL_HEALTH_PORT": "9000", "VOICEPOOL_NAMESPACE": "", "VOICEPOOL_LOG_LEVEL": "DEBUG"}
    )
    assert (settings.health_port, settings.namespace, settings.log_level) == (9000, None, "DEBUG")


def test_a_pool_that_is_named_without_its_namespace_is_of_the_one_that_is_served() -> None:
    names = ("ASSIGNMENT_PRIVATE_KEY_FILE", "API_KEYS_FOLDER", "LIVEKIT_FOLDER")
    files = {f"VOICEPOOL_{name}": f"/etc/{name}" for name in names}
    one = {"VOICEPOOL_NAMESPACE": "calls"}
    assert GatewaySettings.from_environment(files).default_namespace == "default"
    assert GatewaySettings.from_environment(files | one).default_namespace == "calls"
    told = {"VOICEPOOL_DEFAULT_NAMESPACE": "others"}
    assert GatewaySettings.from_environment(files | one | told).default_namespace == "others"


def test_variables_that_kubernetes_adds_for_services_are_ignored() -> None:
    OperatorSettings.from_environment(KEY | {"VOICEPOOL_GATEWAY_PORT": "tcp://10.0.0.1:80"})


def test_each_bad_variable_is_named_with_what_is_wrong() -> None:
    with pytest.raises(SettingsError) as caught:
        OperatorSettings.from_environment({"VOICEPOOL_HEALTH_PORT": "many", "VOICEPOOL_WORKERS": "0"})
    lines = str(caught.value).splitlines()
    assert any(line == "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE: must be set" for line in lines)
    assert any(line.startswith("VOICEPOOL_HEALTH_PORT:") and "'many'" in line for line in lines)
    assert any(line.startswith("VOICEPOOL_WORKERS:") and "1" in line for line in lines)


def test_a_setting_that_follows_from_others_is_not_wrong_because_they_are() -> None:
    with pytest.raises(SettingsError) as caught:
        GatewaySettings.from_environment({"VOICEPOOL_LIVEKIT_FOLDER": "/etc/livekit", "VOICEPOOL_LOG_LEVEL": "LOUD"})
    named = {line.partition(":")[0] for line in str(caught.value).splitlines()}
    assert named == {f"VOICEPOOL_{name}" for name in ("LOG_LEVEL", "ASSIGNMENT_PRIVATE_KEY_FILE", "API_KEYS_FOLDER")}


def test_a_lease_has_a_name_and_a_namespace_or_there_is_none() -> None:
    lease = {"VOICEPOOL_LEASE_NAME": "voicepool-operator", "VOICEPOOL_LEASE_NAMESPACE": "voicepool"}
    assert OperatorSettings.from_environment(KEY | lease).lease_name == "voicepool-operator"
    assert OperatorSettings.from_environment(KEY).lease_name is None
    for missing in lease:
        half = {name: value for name, value in lease.items() if name != missing}
        with pytest.raises(SettingsError, match=f"^{missing} must be set"):
            OperatorSettings.from_environment(KEY | half)


def test_the_service_of_the_gateways_has_a_name_and_a_namespace_or_there_is_none() -> None:
    files = {
        "VOICEPOOL_ASSIGNMENT_PRIVATE_KEY_FILE": "private.pem",
        "VOICEPOOL_API_KEYS_FOLDER": "keys",
        "VOICEPOOL_LIVEKIT_FOLDER": "livekit",
    }
    service = {"VOICEPOOL_PEERS_SERVICE": "voicepool-gateway", "VOICEPOOL_PEERS_NAMESPACE": "voicepool"}
    assert GatewaySettings.from_environment(files | service).peers_service == "voicepool-gateway"
    assert GatewaySettings.from_environment(files).peers_service is None
    for missing in service:
        half = {name: value for name, value in service.items() if name != missing}
        with pytest.raises(SettingsError, match=f"^{missing} must be set"):
            GatewaySettings.from_environment(files | half)


@pytest.mark.parametrize("model", [Settings, OperatorSettings, GatewaySettings])
def test_every_setting_is_explained(model: type[Settings]) -> None:
    source = Path(__file__).parents[2] / "operator/src/voicepool/settings.py"
    lines = source.read_text().splitlines()
    for field in model.model_fields:
        [declared, *_others] = [number for number, line in enumerate(lines) if line.startswith(f"    {field}:")]
        assert lines[declared + 1].strip().startswith('"""'), field


def test_a_log_line_is_json_with_its_fields() -> None:
    stream = io.StringIO()
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logs.set_up("INFO", stream)
        logging.getLogger("voicepool.test").info("pool changes", extra={"pool": "demo", "creates": 3})
        logging.getLogger("voicepool.test").debug("not written")
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("voicepool.test").exception("failed")
    finally:
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["pool"], first["creates"], first["level"]) == ("pool changes", "demo", 3, "info")
    assert "ValueError: broken" in second["stack"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OIDC_ISSUER", "http://issuer.example"),
        ("OIDC_ISSUER", "https://issuer.example?x=1"),
        ("OIDC_JWKS_URL", "file:///etc/keys"),
        ("OIDC_DEFAULT_POOLS", "*/*"),
        ("CORS_ALLOW_ORIGINS", "https://a.example/path"),
        ("CORS_ALLOW_ORIGINS", "a.example"),
        ("TRUSTED_PROXIES", "*"),
    ],
)
def test_what_would_open_more_than_it_says_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"VOICEPOOL_{name}"):
        GatewaySettings.from_environment(
            {
                "VOICEPOOL_ASSIGNMENT_PRIVATE_KEY_FILE": "private.pem",
                "VOICEPOOL_API_KEYS_FOLDER": "keys",
                "VOICEPOOL_LIVEKIT_FOLDER": "livekit",
                "VOICEPOOL_OIDC_AUDIENCE": "voicepool",
                "VOICEPOOL_OIDC_ISSUER": "https://issuer.example",
                f"VOICEPOOL_{name}": value,
            }
        )


def test_an_issuer_has_an_audience_and_lists_have_commas() -> None:
    given = {
        "VOICEPOOL_ASSIGNMENT_PRIVATE_KEY_FILE": "private.pem",
        "VOICEPOOL_API_KEYS_FOLDER": "keys",
        "VOICEPOOL_LIVEKIT_FOLDER": "livekit",
        "VOICEPOOL_OIDC_ISSUER": "https://issuer.example",
    }
    with pytest.raises(SettingsError, match="VOICEPOOL_OIDC_AUDIENCE must be set"):
        GatewaySettings.from_environment(given)
    more = {
        "VOICEPOOL_OIDC_AUDIENCE": "voicepool",
        "VOICEPOOL_CORS_ALLOW_ORIGINS": "https://a.example, http://[::1]:80",
    }
    settings = GatewaySettings.from_environment(given | more)
    assert settings.cors_allow_origins == ("https://a.example", "http://[::1]:80")
