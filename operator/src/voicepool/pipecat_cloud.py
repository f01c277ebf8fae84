"""Turns a deployment of Pipecat Cloud, its ``pcc-deploy.toml``, into a VoiceAgentPool. Pure.

The keys, their defaults and their limits are those of Pipecat Cloud's "deploy" command (its configuration file) and of the package ``pipecatcloud``, 1.4.
Invariant: every key of the file is in the pool, or is said to have no counterpart; none is lost without a word.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from voicepool.crd import MAX_POOL_NAME_CHARACTERS
from voicepool.model import AGENT_CONTAINER, GROUP, KIND, VERSION

FILE_NAME = "pcc-deploy.toml"

PROFILES: Mapping[str, tuple[str, str]] = {
    "agent-1x": ("500m", "1Gi"),
    "agent-2x": ("1", "2Gi"),
    "agent-3x": ("1500m", "3Gi"),
}
"""CPU and memory of Pipecat Cloud's agent profiles ("Deployments", agent profiles)."""

DEFAULT_PROFILE = "agent-1x"

Name = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
"""What Kubernetes takes as the name of an object."""
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")]


class ConversionError(Exception):
    """The file cannot be converted; the message is one line that says what, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A pool, and what has to be known about it."""

    pool: dict[str, Any]
    """The VoiceAgentPool as JSON."""
    steps: tuple[str, ...]
    """What is to be done before it works."""
    warnings: tuple[str, ...]
    """What of the file has no counterpart, each with its key."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    def unknown(self) -> dict[str, Any]:
        """The keys that nothing is known of."""
        return dict(self.model_extra or {})


class _Scaling(_Part):
    min_agents: Annotated[int, Field(ge=0, le=100_000)] = 0
    max_agents: Annotated[int, Field(ge=1, le=100_000)] = 50

    @model_validator(mode="after")
    def _room_for_all(self) -> Self:
        if self.max_agents < self.min_agents:
            raise ValueError("scaling.max_agents must be at least scaling.min_agents")
        return self


class _Resources(_Part):
    cpu: Quantity
    memory: Quantity


class _Deployment(_Part):
    agent_name: Annotated[str, Field(min_length=1)]
    image: Annotated[str, Field(min_length=1)] | None = None
    image_credentials: Name | None = None
    secret_set: Name | None = None
    scaling: _Scaling = _Scaling()
    agent_profile: str | None = None
    resources: _Resources | None = None
    max_session_duration: Annotated[int, Field(ge=60, le=86_400)] | None = None
    architecture: Annotated[str, Field(pattern="^(amd64|arm64)$")] | None = None
    build_id: Any = None
    build: Any = None
    docker: Any = None
    enable_krisp: Any = None
    git: Any = None
    krisp_viva: Any = None
    region: Any = None
    websocket_auth: Any = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.agent_profile is not None and self.resources is not None:
            raise ValueError("agent_profile and resources exclude each other; leave one out")
        return self


_TEXT = "text in quotes"
_OBJECT_NAME = "the name of a Secret: small letters, digits, hyphens and dots"
_QUANTITY = 'a quantity, such as "500m" of CPU or "2Gi" of memory'
_EXPECTED = {
    "agent_name": _TEXT,
    "image": _TEXT,
    "image_credentials": _OBJECT_NAME,
    "secret_set": _OBJECT_NAME,
    "scaling": "a table: [scaling]",
    "scaling.min_agents": "a whole number from 0 to 100000",
    "scaling.max_agents": "a whole number from 1 to 100000",
    "agent_profile": _TEXT,
    "resources": "a table: [resources]",
    "resources.cpu": _QUANTITY,
    "resources.memory": _QUANTITY,
    "max_session_duration": "a whole number of seconds from 60 to 86400",
    "architecture": '"amd64" or "arm64"',
}

_BUILT_ELSEWHERE = "the image is built by you, not by the cloud: docker build, docker push"
_NO_KRISP = "Krisp's noise filter is licensed to Pipecat Cloud and not in the agent image; agents run with ENV=local, so a bot that asks for it does without"
_WITHOUT_COUNTERPART = {
    "build": _BUILT_ELSEWHERE,
    "build_id": _BUILT_ELSEWHERE,
    "docker": _BUILT_ELSEWHERE,
    "git": _BUILT_ELSEWHERE,
    "enable_krisp": _NO_KRISP,
    "krisp_viva": _NO_KRISP,
    "region": "agents run where the cluster is; for some of its zones set spec.template.spec.nodeSelector",
    "websocket_auth": "callers come over LiveKit, each with a token of its own from /start, which an API key guards",
}


def convert(text: str, *, name: str | None = None, image: str | None = None) -> Conversion:
    """Make a pool of a deployment.

    Args:
        text: the content of a ``pcc-deploy.toml``.
        name: of the pool, in the place of the agent's name.
        image: of the agent, in the place of the file's.

    Raises:
        ConversionError: it is no such file, or a value makes no sense.
    """
    deployment = _read(text)
    pool_name = name or deployment.agent_name
    if len(pool_name) > MAX_POOL_NAME_CHARACTERS or not _is_name(pool_name):
        raise ConversionError(
            f"{'--name' if name else 'agent_name'} is {pool_name!r}, but a pool's name has at most {MAX_POOL_NAME_CHARACTERS} small letters, digits"
            " and hyphens, no hyphen at its ends; choose one with --name"
        )
    chosen_image = image or deployment.image
    if chosen_image is None:
        raise ConversionError(
            "image is missing, since Pipecat Cloud has built it; build one FROM the voicepool agent image, push it, and name it with --image"
        )
    warnings: list[str] = []
    spec = {
        "replicas": deployment.scaling.min_agents,
        "maxPods": deployment.scaling.max_agents,
        # As Pipecat Cloud: a caller who finds no warm agent waits for one of their own, up to the maximum.
        "onEmpty": {"policy": "ColdStart"},
    }
    if deployment.max_session_duration is not None:
        spec["session"] = {"maxDurationSeconds": deployment.max_session_duration}
    spec["template"] = {"spec": _pod(deployment, chosen_image, warnings.append)}
    warnings += _without_counterpart(deployment)
    metadata = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": {"name": pool_name}}
    return Conversion({**metadata, "spec": spec}, tuple(_steps(deployment, chosen_image)), tuple(warnings))


def as_yaml(conversion: Conversion, file: str) -> str:
    """The pool as YAML, with what has to be known about it as comments before it.

    Args:
        conversion: from :func:`convert`.
        file: what was converted.
    """
    # Only a command for people writes YAML; both processes do without.
    import yaml

    lines = [f"# From {file} by `voicepool convert`.", "# To do before it works:"]
    lines += [f"#   {step}" for step in conversion.steps]
    if conversion.warnings:
        lines += ["# Without a counterpart:", *(f"#   {warning}" for warning in conversion.warnings)]
    pool: str = yaml.safe_dump(conversion.pool, sort_keys=False, width=120, allow_unicode=True)
    return "\n".join(lines) + "\n" + pool


def _read(text: str) -> _Deployment:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConversionError(f"it is not TOML: {error}; mend that line") from None
    try:
        return _Deployment.model_validate(content)
    except ValidationError as error:
        raise ConversionError("; ".join(_words(problem) for problem in error.errors(include_url=False))) from None


def _words(problem: Any) -> str:
    """One of pydantic's problems in a person's words."""
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"{key} is missing; is this a {FILE_NAME}?"
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{_said(key, problem['input'], ' is ')}; it must be {_EXPECTED[key]}"


def _is_name(name: str) -> bool:
    letters = name.replace("-", "")
    return letters.isascii() and letters.isalnum() and letters == letters.lower() and name.strip("-") == name


def _pod(deployment: _Deployment, image: str, warn: Callable[[str], None]) -> dict[str, Any]:
    container: dict[str, Any] = {"name": AGENT_CONTAINER, "image": image}
    if deployment.secret_set is not None:
        container["envFrom"] = [{"secretRef": {"name": deployment.secret_set}}]
    size = _size(deployment, warn)
    if size is not None:
        cpu, memory = size
        # No limit of CPU: an agent that is throttled in a sentence stutters.
        container["resources"] = {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}
    pod: dict[str, Any] = {"containers": [container]}
    if deployment.image_credentials is not None:
        pod["imagePullSecrets"] = [{"name": deployment.image_credentials}]
    if deployment.architecture is not None:
        pod["nodeSelector"] = {"kubernetes.io/arch": deployment.architecture}
    return pod


def _size(deployment: _Deployment, warn: Callable[[str], None]) -> tuple[str, str] | None:
    if deployment.resources is not None:
        return deployment.resources.cpu, deployment.resources.memory
    profile = deployment.agent_profile or DEFAULT_PROFILE
    if profile not in PROFILES:
        warn(
            f"{_said('agent_profile', profile)}: a profile of your own; set the resources of the container agent to what it stands for"
        )
    return PROFILES.get(profile)


def _without_counterpart(deployment: _Deployment) -> Iterator[str]:
    for key in sorted(deployment.model_fields_set):
        if key in _WITHOUT_COUNTERPART:
            yield f"{_said(key, getattr(deployment, key))}: {_WITHOUT_COUNTERPART[key]}"
    parts = {"": deployment, "scaling.": deployment.scaling, "resources.": deployment.resources}
    for prefix, part in parts.items():
        for key, value in sorted((part.unknown() if part else {}).items()):
            yield f"{_said(prefix + key, value)}: not a key of {FILE_NAME} that is known here"


def _said(key: str, value: Any, verb: str = " = ") -> str:
    """On one line, whatever the file has put into a key or a value."""
    plain = key if key.isascii() and key.isprintable() else json.dumps(key)
    return f"{plain}{verb}{json.dumps(value, default=str)}"


def _steps(deployment: _Deployment, image: str) -> Iterator[str]:
    yield f"build {json.dumps(image)} anew FROM the voicepool agent image: one that is made for Pipecat Cloud does not run here"
    if deployment.secret_set is not None:
        yield (
            f"kubectl create secret generic {deployment.secret_set} --from-env-file=.env"
            " (no quotes, no `export`, no comment behind a value: kubectl takes values as they stand)"
        )
    if deployment.image_credentials is not None:
        yield (
            f"kubectl create secret docker-registry {deployment.image_credentials}"
            " --docker-server=... --docker-username=... --docker-password=..."
        )
