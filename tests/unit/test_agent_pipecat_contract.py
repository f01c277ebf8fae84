"""The private names of the pinned Pipecat that parking needs. An upgrade of Pipecat fails here first."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.pipeline.parallel_pipeline import ParallelPipeline
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.service_switcher import ServiceSwitcher, ServiceSwitcherStrategyFailover
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.processors.audio.vad_processor import VADProcessor
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.runner.types import LiveKitRunnerArguments
from pipecat.transports.livekit.transport import LiveKitParams, LiveKitTransport, LiveKitTransportClient
from pipecat.turns.user_stop import TurnAnalyzerUserTurnStopStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies
from pipecat.workers.runner import WorkerRunner

from voicepool_agent import pipecat_private


def transport() -> LiveKitTransport:
    return LiveKitTransport("", "", "", params=LiveKitParams(audio_in_enabled=True, audio_out_enabled=True))


def worker(*processors: FrameProcessor) -> PipelineWorker:
    return PipelineWorker(Pipeline(list(processors)))


def test_the_pinned_version_is_the_one_that_was_read() -> None:
    assert version("pipecat-ai").startswith("1.14."), "read pipecat_private.py again, then raise this"


async def test_a_runner_shows_the_workers_that_were_added() -> None:
    ours = worker(transport().input())
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(ours)
    assert pipecat_private.pipeline_workers(runner) == [ours]


async def test_a_transport_is_found_once_however_deep_its_ends_are() -> None:
    ours = transport()
    branches = ParallelPipeline([ours.output()], [FrameProcessor()])  # type: ignore[no-untyped-call]
    assert pipecat_private.livekit_transports(worker(ours.input(), branches)) == [ours]


async def test_a_service_that_failed_counts_unless_another_one_can_do_its_work() -> None:
    alone, first, second = FrameProcessor(), FrameProcessor(), FrameProcessor()
    switcher = ServiceSwitcher([first, second], ServiceSwitcherStrategyFailover)
    ours = worker(alone, switcher)
    assert pipecat_private.unusable(ours) == []
    await first.set_usable(False)
    assert pipecat_private.unusable(ours) == []
    await second.set_usable(False)
    assert pipecat_private.unusable(ours) == [switcher]
    await alone.set_usable(False)
    assert set(pipecat_private.unusable(ours)) == {switcher, alone}


async def test_who_hears_and_who_speaks_is_known() -> None:
    ours = transport()
    heard, other = ours.input(), FrameProcessor()
    assert [pipecat_private.talks(one) for one in (heard, ours.output(), other)] == [True, True, False]


async def test_a_transport_goes_to_the_room_that_it_is_pointed_at_after_it_was_built() -> None:
    ours = transport()
    worker(ours.input(), ours.output())
    pipecat_private.point_at_room(ours, url="ws://there", token="a-token", room="a-room")
    client = ours._client
    assert (client._url, client._token, client._room_name) == ("ws://there", "a-token", "a-room")
    connect = inspect.unwrap(LiveKitTransportClient.connect)
    read = set(connect.__code__.co_names)
    assert {"_url", "_token", "_room_name"} <= read, "connect() no longer reads what point_at_room() writes"


@pytest.mark.parametrize("with_processor", [True, False], ids=["in a VADProcessor", "in the user aggregator"])
async def test_models_are_found_and_answer(with_processor: bool) -> None:
    vad, turn = SileroVADAnalyzer(), LocalSmartTurnAnalyzerV3()
    strategies = UserTurnStrategies(stop=[TurnAnalyzerUserTurnStopStrategy(turn_analyzer=turn)])
    parameters = LLMUserAggregatorParams(vad_analyzer=None if with_processor else vad, user_turn_strategies=strategies)
    user = LLMContextAggregatorPair(LLMContext(), user_params=parameters).user()
    ours = worker(*([VADProcessor(vad_analyzer=vad)] if with_processor else []), user)
    assert pipecat_private.vad_analyzers(ours) == [vad]
    assert pipecat_private.smart_turn_analyzers(ours) == [turn]
    assert 0 <= pipecat_private.infer_smart_turn(turn) <= 1


async def test_smart_turn_is_found_where_nobody_asked_for_it() -> None:
    user = LLMContextAggregatorPair(LLMContext()).user()
    assert len(pipecat_private.smart_turn_analyzers(worker(user))) == 1


def test_runner_arguments_can_be_filled_after_the_bot_has_seen_them() -> None:
    arguments = LiveKitRunnerArguments(room_name="", url="", token="", body={}, session_id=None)
    body = arguments.body
    arguments.session_id, arguments.room_name = "s-1", "r-1"
    assert arguments.body is body
