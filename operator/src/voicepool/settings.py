"""Everything that can be set from outside: ``VOICEPOOL_*`` environment variables, read once at the start into a frozen model.

A field ``health_port`` is the variable ``VOICEPOOL_HEALTH_PORT``. Other ``VOICEPOOL_*`` variables are ignored, since Kubernetes itself adds
some for Services.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

PREFIX = "VOICEPOOL_"


class SettingsError(Exception):
    """A setting is missing or wrong; the message names each variable and says what is wrong with it."""


class Settings(BaseModel):
    """What both processes need."""

    model_config = ConfigDict(frozen=True, extra="ignore", str_strip_whitespace=True)

    kubeconfig: Path | None = None
    """A kubeconfig file. Default: the pod's service account, else ``$KUBECONFIG`` or ``~/.kube/config``."""
    kube_context: str | None = None
    """A context of the kubeconfig. Default: its current one."""
    namespace: str | None = None
    """Serve the pools of this namespace only. Default: of all namespaces."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least severe log record that is written."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long one request to the API server may take; watches are not meant."""
    watch_silence_seconds: Annotated[float, Field(ge=65)] = 90.0
    """A watch that says nothing for so long is dead. The API server sends a bookmark about once a minute."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the settings.

        Empty variables count as not set.

        Args:
            environment: usually ``os.environ``.

        Raises:
            SettingsError: with one line for each bad variable.
        """
        values = {
            field: environment[PREFIX + field.upper()]
            for field in cls.model_fields
            if environment.get(PREFIX + field.upper())
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = []
            for problem in error.errors(include_url=False):
                if problem["type"] == "default_factory_not_called":
                    # It follows from another one.
                    continue
                if not problem["loc"]:
                    lines.append(problem["msg"].removeprefix("Value error, "))
                    continue
                variable = PREFIX + str(problem["loc"][0]).upper()
                found = "" if problem["type"] == "missing" else f" (it is {values.get(str(problem['loc'][0]))!r})"
                lines.append(f"{variable}: {'must be set' if problem['type'] == 'missing' else problem['msg']}{found}")
            raise SettingsError("\n".join(lines)) from None


def _list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_list)]
"""Words with commas between them."""

_URL = r"^(https://[^/?#@\s]+|http://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?)(/[^?#\s]*)?$"
"""Keys that come without TLS could be anybody's; to this machine itself nobody is in between."""
_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9A-Fa-f:]+\](:[0-9]{1,5})?")
_POOL = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/(\*|[a-z0-9]([-a-z0-9.]*[a-z0-9])?)")


class OperatorSettings(Settings):
    """The operator's settings."""

    assignment_public_key_file: Path
    """PEM file with the gateway's Ed25519 public key, or an X.509 certificate of it. Agents accept no assignment that it does not verify."""
    health_host: str = "0.0.0.0"  # noqa: S104 - the kubelet comes from outside of the pod
    """Address of ``/livez``, ``/readyz`` and ``/metrics``."""
    health_port: Annotated[int, Field(ge=0, le=65535)] = 8081
    """Port of ``/livez``, ``/readyz`` and ``/metrics``; 0 is any free one."""
    workers: Annotated[int, Field(ge=1, le=64)] = 4
    """How many pools are worked on at the same time."""
    parallel_writes: Annotated[int, Field(ge=1, le=256)] = 16
    """How many creates or deletes of one pool are under way at the same time."""
    resync_seconds: Annotated[float, Field(ge=1)] = 60.0
    """Every pool is looked at this often, even if nothing seems to have happened."""
    orphan_retention_seconds: Annotated[int, Field(ge=0)] = 300
    """How long an ended pod is kept whose pool is gone."""
    lease_name: str | None = None
    """The Lease that one of several operators holds while it works. Default: none, this process is the only one."""
    lease_namespace: str | None = None
    """The namespace of the Lease. Must be set with its name."""
    lease_identity: str | None = None
    """This process's name in the Lease, different from every other's. Default: the host's name and something random."""

    webhook_url: str | None = None
    """Where the beginning and the end of each session are told, by signed POST. Must be set with the secret's file. Default: nowhere."""
    webhook_secret_file: Path | None = None
    """A file with the secret that signs them: ``whsec_`` and base64 of 24 to 64 bytes; several, one a line, all sign. Must be set with the address."""

    @model_validator(mode="after")
    def _whole_webhook(self) -> Self:
        if (self.webhook_url is None) != (self.webhook_secret_file is None):
            missing = "WEBHOOK_SECRET_FILE" if self.webhook_secret_file is None else "WEBHOOK_URL"
            raise ValueError(f"{PREFIX}{missing} must be set, since the other one of the two is")
        if self.webhook_url is not None:
            parts = urlsplit(self.webhook_url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
                raise ValueError(
                    f"{PREFIX}WEBHOOK_URL must be an address like https://example.com/hook, with no name or password in it"
                )
        return self

    @model_validator(mode="after")
    def _whole_lease(self) -> Self:
        if (self.lease_name is None) != (self.lease_namespace is None):
            missing = "LEASE_NAMESPACE" if self.lease_namespace is None else "LEASE_NAME"
            raise ValueError(f"{PREFIX}{missing} must be set, since the other one of the two is")
        return self


class GatewaySettings(Settings):
    """The gateway's settings."""

    assignment_private_key_file: Path
    """PEM file (PKCS8) with the Ed25519 private key that signs assignments."""
    api_keys_folder: Path
    """A folder with one file for each API key, named as the key: ``sha256:<hex>``, optionally followed by ``pools=<namespace>/<pool>,...``."""
    livekit_folder: Path
    """A folder with the files ``url``, ``api-key`` and ``api-secret``."""
    default_namespace: str = Field(default_factory=lambda settings: settings["namespace"] or "default")
    """The namespace of a pool that a caller names without one. Default: ``VOICEPOOL_NAMESPACE`` where that is set, else ``default``."""
    default_pool: str | None = None
    """The pool of a caller who names none. Default: the only pool that the caller may use."""
    health_is_public: bool = True
    """Whether ``/api/health``, which tells counts only, needs no API key."""
    web_client: bool = False
    """Whether Pipecat's prebuilt web client is served at ``/client/``, to talk to an agent from a browser. The browser asks for an API key."""
    listen_host: str = "0.0.0.0"  # noqa: S104 - callers come from outside of the pod
    """Address of the session API."""
    listen_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of the session API; 0 is any free one."""
    oidc_issuer: Annotated[str, Field(pattern=_URL)] | None = None
    """Take tokens of this OpenID Connect issuer, by the ``iss`` that they have. Default: none are taken."""
    oidc_audience: str | None = None
    """What the tokens' ``aud`` must hold. Must be set with the issuer."""
    oidc_jwks_url: Annotated[str, Field(pattern=_URL)] | None = None
    """Where the issuer's keys are. Default: where its discovery document says."""
    oidc_name_claim: Annotated[str, Field(min_length=1)] = "sub"
    """The claim that names the caller."""
    oidc_pools_claim: Annotated[str, Field(min_length=1)] = "voicepool_pools"
    """The claim with the list of the caller's pools: ``<namespace>/<pool>`` or ``<namespace>/*``."""
    oidc_default_pools: Names = ()
    """The pools of a token without that claim. Default: none."""
    token_review_audience: str | None = None
    """Take tokens of ServiceAccounts for this audience; the API server reviews them, and RBAC decides on pools. Default: none are taken."""
    cors_allow_origins: Names = ()
    """Origins of pages that may call the session API from a browser, exactly; ``*`` is all. Default: none."""
    trusted_proxies: Names = ()
    """Addresses and networks of proxies whose ``X-Forwarded-For`` is believed. Default: none, the address is that of the connection."""
    sessions_per_caller: Annotated[int, Field(ge=0)] = 0
    """How many sessions a caller may have at the same time, who has no number of its own; 0 is without a limit."""
    starts_per_minute: Annotated[int, Field(ge=0)] = 0
    """How many sessions a caller may start in a minute at one gateway, who has no number of its own; 0 is without a limit."""
    starts_burst: Annotated[int, Field(ge=1)] = 20
    """How many of them may come at once."""
    failed_authentications_per_minute: Annotated[int, Field(ge=0)] = 20
    """How many wrong credentials one address may send in a minute; 0 is without a limit."""
    peers_namespace: str | None = None
    """The namespace of the gateways' Service. Must be set with its name."""
    peers_service: str | None = None
    """The Service of all gateways, through which they find each other and add up who waits. Default: none, this process is the only one."""
    custom_metrics_folder: Path | None = None
    """A folder with ``tls.crt`` and ``tls.key``: serve ``custom.metrics.k8s.io`` to the API server with them. Default: it is not served."""
    custom_metrics_host: str = "0.0.0.0"  # noqa: S104 - the API server comes from outside of the pod
    """Address of ``custom.metrics.k8s.io``."""
    custom_metrics_port: Annotated[int, Field(ge=0, le=65535)] = 8443
    """Port of ``custom.metrics.k8s.io``; 0 is any free one."""

    @model_validator(mode="after")
    def _whole_service(self) -> Self:
        if (self.peers_service is None) != (self.peers_namespace is None):
            missing = "PEERS_NAMESPACE" if self.peers_namespace is None else "PEERS_SERVICE"
            raise ValueError(f"{PREFIX}{missing} must be set, since the other one of the two is")
        return self

    @model_validator(mode="after")
    def _whole_issuer(self) -> Self:
        if (self.oidc_issuer is None) != (self.oidc_audience is None):
            missing = "OIDC_AUDIENCE" if self.oidc_audience is None else "OIDC_ISSUER"
            raise ValueError(f"{PREFIX}{missing} must be set, since the other one of the two is")
        return self

    @field_validator("cors_allow_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin; write it as https://host or https://host:port, without a path"
                )
        return origins

    @field_validator("oidc_default_pools")
    @classmethod
    def _pools(cls, pools: tuple[str, ...]) -> tuple[str, ...]:
        for pool in pools:
            if not _POOL.fullmatch(pool):
                raise ValueError(f"{pool!r} is not <namespace>/<pool> or <namespace>/*")
        return pools

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            # "*" would let every caller choose its address.
            ip_network(network)
        return networks
