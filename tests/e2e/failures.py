"""Failures that the tests cause for real in pods, with the words that each of them leaves behind; the documentation shows them.

In words, `...` stands for what differs from time to time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.e2e.deployment import Json
from tests.e2e.pools import REFERENCE, light


@dataclass(frozen=True, slots=True)
class BuildFailure:
    """Agents that never become Ready.

    Attributes:
        pool: its name.
        what: is wrong.
        words: a line of the pod's log; also its termination message, where it has come to its end.
        container: of the pool's template.
        spec: what else the pool has.
        reason: of the condition Ready.
        event: the reason of the Event.
    """

    pool: str
    what: str
    words: str
    container: Json
    spec: Json = field(default_factory=dict)
    reason: str = "AgentFailed"
    event: str = "StartFailed"

    @property
    def row(self) -> str:
        """In the documentation."""
        return f"| {self.what} | `{self.reason}` | `{self.words}` |"


NOWHERE = {
    **{f"{provider}_API_KEY": "no-key" for provider in ("ASSEMBLYAI", "GROQ", "INWORLD")},
    **{f"{provider}_URL": "ws://127.0.0.1:9" for provider in ("ASSEMBLYAI", "INWORLD")},
}
"""Port 9 of a pod's loopback address: nobody listens."""

BUILD_FAILURES = (
    BuildFailure(
        "never-ready",
        "the bot's own `readyz()` never agrees: the words are in the pod's log, and the condition says that the pod `was not Ready within 45 s`",
        "readyz() of the bot /bots/never_ready.py says no; the agent is not Ready until it agrees",
        light("never_ready.py"),
        {"startup": {"deadlineSeconds": 45}},
        reason="StartupDeadlineExceeded",
        event="StartupDeadlineExceeded",
    ),
    BuildFailure(
        "holds-up",
        "the bot blocks the event loop",
        "the bot /bots/holds_up.py has held up the event loop for 15 s in line 10 of holds_up.py;"
        " await there, or put it into asyncio.to_thread()",
        light("holds_up.py", VOICEPOOL_STARTUP_BLOCKED_TIMEOUT_SECONDS="15"),
    ),
    BuildFailure(
        "no-file",
        "`BOT` names a file that is not there",
        "there is no bot at /bots/no_file.py; set BOT to the path of a .py file or to the name of a module",
        light("no_file.py"),
    ),
    BuildFailure(
        "no-module",
        "`BOT` names a module that is not there",
        "there is no module no_module; set BOT to the path of a .py file or to the name of a module",
        light(BOT="no_module"),
    ),
    BuildFailure(
        "missing-module",
        "the bot imports what the image does not have",
        "the bot /bots/missing_module.py needs the module speech_toolkit, which is not in the image; add it to its requirements",
        light("missing_module.py"),
    ),
    BuildFailure(
        "syntax-error",
        "the bot is no Python",
        "the bot /bots/syntax_error.py failed: SyntaxError: invalid syntax (line 1 of syntax_error.py)",
        light("syntax_error.py"),
    ),
    BuildFailure(
        "missing-key",
        "a variable that the bot reads is not set",
        "the bot /bots/missing_key.py failed: KeyError: 'SPEECH_API_KEY' (line 10 of missing_key.py)",
        light("missing_key.py"),
    ),
    BuildFailure(
        "missing-keys",
        "the reference bot has no keys of its providers",
        "the bot /app/bot.py failed: MissingKeys: set ASSEMBLYAI_API_KEY, GROQ_API_KEY, INWORLD_API_KEY"
        " in the Secret that spec.template.spec.containers[agent].envFrom names (line ... of bot.py)",
        REFERENCE,
    ),
    BuildFailure(
        "own-transport",
        "the bot makes a transport of another kind itself",
        "the bot /bots/own_transport.py failed: TransportNotInstalled: DailyTransportClient needs the package daily,"
        " which is not in the image; agents of a pool are called over LiveKit (line 10 of own_transport.py)",
        light("own_transport.py"),
    ),
    BuildFailure(
        "no-transport",
        "the bot's pipeline has no LiveKit transport",
        "the bot /bots/no_transport.py runs a pipeline without a LiveKit transport; give create_transport() an entry"
        ' "livekit", and put transport.input() and transport.output() into the pipeline',
        light("no_transport.py"),
    ),
    BuildFailure(
        "returns",
        "`bot()` returns at once",
        "the bot /bots/returns.py returned without running a pipeline; bot() must await WorkerRunner.run()",
        light("returns.py"),
    ),
    BuildFailure(
        "reads-body",
        "the bot reads `body` while it is being built",
        "the bot /bots/reads_body.py reads runner_args.body while it is being built (line 9 of reads_body.py),"
        " when there is no caller yet; set spec.warmth to Imported, or read it in on_client_connected",
        light("reads_body.py"),
    ),
    BuildFailure(
        "not-connected",
        "with `warmth: Started`, a provider cannot be reached",
        "the bot /app/bot.py cannot wait with its providers connected: AssemblyAISTTService: ...",
        {**REFERENCE, "env": [{"name": name, "value": value} for name, value in NOWHERE.items()]},
        {"warmth": "Started"},
    ),
)


@dataclass(frozen=True, slots=True)
class SessionFailure:
    """A session that ends as nobody wished.

    Attributes:
        pool: its name.
        what: happens.
        reason: of the end.
        completion: the session's `completionStatus`.
        error: one of the summary's errors; empty where it has none.
        exit_code: of the agent's process.
    """

    pool: str
    what: str
    reason: str
    completion: str = "completed"
    error: str = ""
    exit_code: int = 0

    @property
    def dropped(self) -> bool:
        """Whether there is no summary."""
        return self.completion == "dropped"

    @property
    def row(self) -> str:
        """In the documentation."""
        last = (
            f"Event `SessionDropped`: `{self.error}`" if self.dropped else f"`{self.error}`" if self.error else "none"
        )
        return f"| {self.what} | `{self.completion}` | `{self.reason}` | {last} |"


DROPPED = "Session ... was dropped with pod ... ({}, exit code {})"

SESSION_FAILURES = (
    SessionFailure("nobody-joins", "nobody joins within `session.joinTimeoutSeconds`", "nobody-joined"),
    SessionFailure("idle", "silence on both sides for `session.idleTimeoutSeconds`", "idle"),
    SessionFailure("max-duration", "the call lasts for `session.maxDurationSeconds`", "max-duration"),
    SessionFailure("caller-gone", "the caller's program or network is gone without a word", "caller-left"),
    SessionFailure(
        "no-livekit",
        "the agent cannot reach LiveKit when the session starts",
        "not-joined",
        "failed",
        "LiveKitInputTransport cannot be used",
    ),
    SessionFailure(
        "key-refused",
        "a provider refuses the key when the session starts",
        "not-joined",
        "failed",
        "AssemblyAISTTService: authentication: ...401...",
    ),
    SessionFailure(
        "key-expired",
        "a provider refuses the key in the call",
        "provider-failed",
        "failed",
        "GroqLLMService: authentication: ...401...",
    ),
    SessionFailure(
        "no-answer",
        "a provider does not answer when the session starts",
        "not-joined",
        "failed",
        "not joined in time, still waiting for AssemblyAISTTService, InworldTTSService to connect",
    ),
    SessionFailure(
        "silent",
        "a provider never answers in the call",
        "stuck",
        "failed",
        "nothing has come through the pipeline for 8 s: GroqLLMService held it up",
    ),
    SessionFailure(
        "closes",
        "a provider closes each connection in the middle",
        "provider-failed",
        "failed",
        "AssemblyAISTTService: ...connection failed 3 times...",
    ),
    SessionFailure(
        "raises",
        "with `warmth: Imported`, the bot fails with its caller's `body`",
        "bot-failed",
        "failed",
        "the bot /bots/needs_a_name.py failed: KeyError: 'name' (line 9 of needs_a_name.py)",
    ),
    SessionFailure(
        "blocks",
        "the bot blocks the event loop in the call",
        "stuck",
        "failed",
        "the bot /bots/blocks.py has held up the event loop for 3 s in line 19 of blocks.py;"
        " await there, or put it into asyncio.to_thread()",
    ),
    SessionFailure(
        "holds-the-lock",
        "a C function that the bot calls keeps the interpreter's lock in the call",
        "crashed",
        "dropped",
        DROPPED.format("crashed", 1),
        1,
    ),
    SessionFailure(
        "eats-memory",
        "the agent needs more memory than its limit",
        "out-of-memory",
        "dropped",
        DROPPED.format("out-of-memory", 137),
        137,
    ),
    SessionFailure(
        "killed-in-goodbye",
        "the agent is killed while it says goodbye: why it was ending is known",
        "drained",
        "failed",
        exit_code=137,
    ),
)

KILLED = SessionFailure(
    "killed", "the agent is killed in the call (kill -9)", "crashed", "dropped", DROPPED.format("crashed", 137), 137
)
LIVEKIT_LOST = SessionFailure(
    "livekit-killed",
    "LiveKit is killed in the call and stays away",
    "livekit-lost",
    "failed",
    "disconnected from LiveKit: ...",
)


def says(words: str, text: str, *, entirely: bool = False) -> bool:
    """Whether a text has these words in it, or is them."""
    pattern = re.escape(words).replace(re.escape("..."), ".*")
    return (re.fullmatch if entirely else re.search)(pattern, text) is not None
