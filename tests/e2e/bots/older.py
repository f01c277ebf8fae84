"""As bots were written before Pipecat 1.3, with a route on the application of Pipecat's runner."""

from __future__ import annotations

from typing import Any

from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineTask
from pipecat.runner.run import app, main
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.transports.base_transport import BaseTransport, TransportParams


async def bot(runner_args: RunnerArguments) -> None:
    """One call."""
    params = {"webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True)}
    transport = await create_transport(runner_args, params)
    task = PipelineTask(Pipeline([transport.input(), transport.output()]))

    @app.get("/hello")
    async def hello() -> dict[str, str | None]:
        return {"hello": runner_args.session_id}

    @transport.event_handler("on_client_disconnected")  # type: ignore[untyped-decorator]
    async def hang_up(_transport: BaseTransport, _client: Any) -> None:
        await task.cancel()

    await PipelineRunner(handle_sigint=False).run(task)


if __name__ == "__main__":
    main()
