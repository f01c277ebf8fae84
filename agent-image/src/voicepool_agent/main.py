"""The process: settings, log, signals, exit code.

Imports late: loguru must not set up a sink of its own first (a bot that removes sink 0, as Pipecat's examples do,
then finds ours there), and wrong settings need no Pipecat.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time

from voicepool_agent import process


def main() -> None:
    """Run one agent, and exit with its code. Threads or children that a bot leaves behind do not keep the process."""
    if os.getpid() == 1:
        process.supervise()
    # Building makes a quarter of a million objects that all stay; looking for garbage among them takes a third of the
    # time. The host collects when it has parked.
    gc.disable()
    prepare_imports()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    code = loop.run_until_complete(_run())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_imports() -> None:
    """Set and install what has to be there before Pipecat or a bot is imported."""
    os.environ.setdefault("LOGURU_AUTOINIT", "False")
    # Models come with packages; a library that would fetch one at run time fails at once instead.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # ONNX Runtime reports its use to its maker unless told not to; what an agent does is nobody's business.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # As Pipecat's own runner does: bots take the noise filter that only Pipecat Cloud's images have when it is not.
    os.environ.setdefault("ENV", "local")
    from voicepool_agent import deferred, lazy_packages, other_transports, pipecat_cloud

    lazy_packages.install()
    deferred.install()
    other_transports.install()
    pipecat_cloud.install()


async def _run() -> int:
    from loguru import logger

    from voicepool_agent.assignments import OrderVerifier
    from voicepool_agent.bot_routes import BotRoutes
    from voicepool_agent.host import Host, State
    from voicepool_agent.logs import Logs, Redactor
    from voicepool_agent.metrics import Metrics
    from voicepool_agent.server import Server
    from voicepool_agent.settings import SettingsError, check_recording_path, read_settings, termination_message_path
    from voicepool_agent.summary import write_termination_message
    from voicepool_agent.tracing import FLUSH_SECONDS, make_tracing

    try:
        settings = read_settings(os.environ)
        check_recording_path(settings)
        verifier = OrderVerifier(settings.assignment_public_key, settings.pod_uid, time.time)
    except (SettingsError, ValueError) as error:
        print(f"voicepool-agent: {error}", file=sys.stderr)  # noqa: T201 - there is no log yet
        write_termination_message(termination_message_path(os.environ), str(error))
        return 1
    redact = Redactor()
    redact.add_environment(os.environ)
    logs = Logs(settings, redact)
    logs.configure()
    metrics = Metrics([state.value for state in State])
    bot_routes = BotRoutes()
    tracing = make_tracing(os.environ, settings)
    host = Host(settings, metrics, logs, redact, bot_routes, tracing)
    server = Server(settings, host, verifier, metrics, bot_routes)
    try:
        await server.start()
    except OSError as error:
        logger.error(f"cannot listen on {settings.listen_address}:{settings.port}: {error}")
        return 1
    try:
        return await host.run()
    finally:
        await asyncio.wait({asyncio.wrap_future(tracing.leave())}, timeout=FLUSH_SECONDS)
        await server.close()


if __name__ == "__main__":
    main()
