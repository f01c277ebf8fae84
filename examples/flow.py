"""A bot that leads a conversation from node to node with Pipecat Flows: when the guest comes, and for how long."""

from __future__ import annotations

from typing import Any

from pipecat.flows import FlowManager, NodeConfig
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.transports.base_transport import BaseTransport, TransportParams
from services import both_sides_of, language_model, run_until_hung_up, speech_to_text, text_to_speech

transport_params = {"webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True)}


def arrival() -> NodeConfig:
    """The first node."""
    task = {"role": "developer", "content": "Greet the guest and ask on which day they arrive."}
    return NodeConfig(name="arrival", task_messages=[task], functions=[note_arrival])


def nights() -> NodeConfig:
    """The second node."""
    task = {"role": "developer", "content": "Ask for how many nights they stay."}
    return NodeConfig(name="nights", task_messages=[task], functions=[note_nights])


def farewell() -> NodeConfig:
    """The last node: it ends the call."""
    task = {"role": "developer", "content": "Thank the guest and say goodbye."}
    return NodeConfig(name="farewell", task_messages=[task], post_actions=[{"type": "end_conversation"}])


async def note_arrival(flow_manager: FlowManager, weekday: str) -> tuple[dict[str, Any], NodeConfig]:
    """Note the day of arrival.

    Args:
        weekday: The day of the week.
    """
    flow_manager.state["weekday"] = weekday
    return {"weekday": weekday}, nights()


async def note_nights(flow_manager: FlowManager, number: int) -> tuple[dict[str, Any], NodeConfig]:
    """Note how long the guest stays.

    Args:
        number: How many nights.
    """
    return {"weekday": flow_manager.state["weekday"], "nights": number}, farewell()


async def bot(runner_args: RunnerArguments) -> None:
    """One conversation."""
    transport = await create_transport(runner_args, transport_params)
    sides, model = both_sides_of(LLMContext()), language_model()
    pipeline = Pipeline(
        [
            transport.input(),
            speech_to_text(),
            sides.user(),
            model,
            text_to_speech(),
            transport.output(),
            sides.assistant(),
        ]
    )
    worker = PipelineWorker(pipeline, idle_timeout_secs=runner_args.pipeline_idle_timeout_secs)
    flow = FlowManager(worker=worker, llm=model, context_aggregator=sides, transport=transport)

    @transport.event_handler("on_client_connected")
    async def begin(_transport: BaseTransport, _client: Any) -> None:
        await flow.initialize(arrival())

    await run_until_hung_up(worker, transport, runner_args)


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
