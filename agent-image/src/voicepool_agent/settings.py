"""What the agent is told: environment variables, read once, checked by one pydantic model.

Names that begin with VOICEPOOL_ are injected by the operator or set in the pod template; `BOT` and `PORT` are the
names that an agent image is used to. Nothing else in the package reads the environment, but for the bot, which reads
what it likes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

TERMINATION_LOG = Path("/dev/termination-log")
"""Kubernetes' default `terminationMessagePath`."""


class SettingsError(Exception):
    """The environment does not make sense; the message names the variables and what they may be."""


class Warmth(StrEnum):
    """How far the agent goes before it waits for a session."""

    IMPORTED = "Imported"
    """The bot's module is imported and what models it uses have run once; `bot()` is called at the bind."""
    BUILT = "Built"
    """The pipeline is built, and no connection is open."""
    STARTED = "Started"
    """The pipeline's services are connected to their providers; at the bind the room is joined."""


class Settings(BaseModel):
    """Everything that can be set, with its variable as alias."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    bot: str = Field("bot.py", alias="BOT", min_length=1)
    """Path of a .py file, or the name of a module, that has `async def bot(runner_args)`."""

    listen_address: str = Field("0.0.0.0", alias="VOICEPOOL_LISTEN_ADDRESS")  # noqa: S104 - the gateway and the probes come from outside the pod
    port: int = Field(8080, alias="PORT", ge=0, le=65535)

    pod_name: str = Field("", alias="VOICEPOOL_POD_NAME")
    pod_uid: str = Field(alias="VOICEPOOL_POD_UID", min_length=1)
    """The audience of every assignment: nobody else's assignment is accepted."""
    pod_namespace: str = Field("", alias="VOICEPOOL_POD_NAMESPACE")
    pool: str = Field("", alias="VOICEPOOL_POOL")

    assignment_public_key: str = Field(alias="VOICEPOOL_ASSIGNMENT_PUBLIC_KEY", min_length=1)
    """Ed25519 public key in PEM, of the only one who may assign."""

    warmth: Warmth = Field(Warmth.BUILT, alias="VOICEPOOL_WARMTH")
    """How far it goes before it waits."""

    max_duration_seconds: float = Field(7200, alias="VOICEPOOL_SESSION_MAX_DURATION_SECONDS", gt=0)
    """From the bind on. Then the session ends, whoever is talking."""

    join_timeout_seconds: float = Field(30, alias="VOICEPOOL_SESSION_JOIN_TIMEOUT_SECONDS", gt=0)
    """From the bind on, until a caller is in the room."""

    idle_timeout_seconds: float = Field(300, alias="VOICEPOOL_SESSION_IDLE_TIMEOUT_SECONDS", gt=0)
    """Silence on both sides. Pipecat's own idle timer, given to the bot as `runner_args.pipeline_idle_timeout_secs`."""

    connect_timeout_seconds: float = Field(20, alias="VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS", gt=0)
    """From the bind on, until the agent has joined. Pipecat itself tries three times, which takes about 9 s with
    nobody there. With the warmth `Started` also how long providers may take to accept a connection, before the bind."""

    caller_left_grace_seconds: float = Field(3, alias="VOICEPOOL_SESSION_CALLER_LEFT_GRACE_SECONDS", ge=0)
    """How long an empty room may wait for the caller to come back, unless the bot ends by itself before."""

    drain_timeout_seconds: float = Field(20, alias="VOICEPOOL_SESSION_DRAIN_TIMEOUT_SECONDS", ge=0)
    """How long a session that was told to end may finish its sentence and say goodbye."""

    provider_grace_seconds: float = Field(5, alias="VOICEPOOL_SESSION_PROVIDER_GRACE_SECONDS", ge=0)
    """How long a call goes on with a processor that can no longer be used, for the bot to bring it back or to say so."""

    stuck_timeout_seconds: float = Field(60, alias="VOICEPOOL_SESSION_STUCK_TIMEOUT_SECONDS", gt=0)
    """How long a call goes on in which nothing comes through the pipeline and the agent says nothing."""

    blocked_timeout_seconds: float = Field(20, alias="VOICEPOOL_BLOCKED_TIMEOUT_SECONDS", gt=0)
    """How long code of the bot may hold up the event loop of a parked or bound agent; the kubelet kills after 30 s."""

    startup_blocked_timeout_seconds: float = Field(60, alias="VOICEPOOL_STARTUP_BLOCKED_TIMEOUT_SECONDS", gt=0)
    """The same while the bot is being built, when it may load models."""

    recording_audio: bool = Field(False, alias="VOICEPOOL_RECORDING_AUDIO")
    """Write down what is heard in a session, as a WAV file."""

    recording_transcript: bool = Field(False, alias="VOICEPOOL_RECORDING_TRANSCRIPT")
    """Write down what is said in a session, as lines of JSON."""

    recording_path: Path = Field(Path("/recordings"), alias="VOICEPOOL_RECORDING_PATH")
    """The folder for both."""

    termination_grace_seconds: float | None = Field(None, alias="VOICEPOOL_TERMINATION_GRACE_SECONDS", ge=0)
    """The pod's `terminationGracePeriodSeconds`: the kubelet kills so long after SIGTERM. None: not known."""

    termination_message_path: Path = Field(TERMINATION_LOG, alias="VOICEPOOL_TERMINATION_MESSAGE_PATH")
    log_format: Literal["json", "text"] = Field("json", alias="VOICEPOOL_LOG_FORMAT")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias=AliasChoices("VOICEPOOL_LOG_LEVEL", "PIPECAT_LOG_LEVEL")
    )
    """The second name is Pipecat Cloud's. For the bot's own lines and the host's. Pipecat's never go below INFO: its DEBUG lines hold what people say."""

    debug: bool = Field(False, alias="VOICEPOOL_DEBUG")
    """Stack traces in the log."""

    @field_validator("log_level", mode="before")
    @classmethod
    def _is_a_level(cls, value: str) -> str:
        # Pipecat Cloud knows two levels more.
        return {"TRACE": "DEBUG", "NONE": "ERROR"}.get(value.upper(), value.upper())

    @field_validator("assignment_public_key")
    @classmethod
    def _is_a_public_key(cls, value: str) -> str:
        if "-----BEGIN PUBLIC KEY-----" not in value:
            raise ValueError("must be a PEM block that begins with -----BEGIN PUBLIC KEY-----")
        return value


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the settings from an environment. An empty variable counts as not set.

    Raises:
        SettingsError: a variable is missing or wrong; the message names all of them.
    """
    try:
        return Settings.model_validate({name: value for name, value in environment.items() if value != ""})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))
        raise SettingsError("the agent's environment is not complete: " + "; ".join(problems)) from None


def check_recording_path(settings: Settings) -> None:
    """Make sure that sessions can be written down where that is asked for.

    Raises:
        SettingsError: they cannot.
    """
    if not settings.recording_audio and not settings.recording_transcript:
        return
    folder = settings.recording_path
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise SettingsError(
            f"nothing can be written to {folder}, which spec.session.recording.path names ({error.strerror});"
            " mount a volume there in spec.template that the agent's user may write to"
        ) from None


def termination_message_path(environment: Mapping[str, str]) -> Path:
    """Where a message goes when the settings cannot be read."""
    return Path(environment.get("VOICEPOOL_TERMINATION_MESSAGE_PATH") or TERMINATION_LOG)
