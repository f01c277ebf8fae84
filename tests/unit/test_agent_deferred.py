"""What imports put off until it is used: it is as it was then. Each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

INSTALL = "from voicepool_agent import deferred; deferred.install()\n"


def run(program: str, *, deferred: bool = True) -> Any:
    """What a program prints, as JSON."""
    source = (INSTALL if deferred else "") + "import json, sys\n" + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_number_words_are_loaded_by_the_first_number() -> None:
    found = run(
        """
        from num2words import num2words
        before = "num2words.lang_EN" in sys.modules
        words = [num2words(42, lang="en"), num2words(7, lang="de")]
        import num2words as package
        print(json.dumps([before, words, package.num2words is num2words, len(package.CONVERTER_CLASSES) > 40]))
        """
    )
    assert found == [False, ["forty-two", "sieben"], False, True]


def test_another_name_of_the_number_words_loads_them_too() -> None:
    assert run("import num2words\nprint(json.dumps('en' in num2words.CONVERTER_CLASSES))") is True
    with pytest.raises(subprocess.CalledProcessError):
        run("import num2words\nnum2words.nothing")


def test_httpx_does_without_its_command_line() -> None:
    found = run(
        """
        import httpx
        print(json.dumps([callable(httpx.main), "rich" in sys.modules, httpx.Client().trust_env]))
        """
    )
    assert found == [True, False, True]


MODELS = """
    from pydantic import BaseModel, ValidationError
    from pipecat.processors.frameworks.rtvi import models
    from pipecat.metrics.metrics import TTFBMetricsData
    class Own(BaseModel):
        x: int
    def is_refused(model, values):
        try:
            model.model_validate(values)
        except ValidationError:
            return True
        return False
    kinds = sorted(name for name in dir(models) if isinstance(getattr(models, name), type))
    put_off = not models.Message.__pydantic_complete__
    data = TTFBMetricsData(processor="p", value=0.5).model_dump()
    refused = [is_refused(models.Message, {"label": 1}), is_refused(TTFBMetricsData, {"value": "no"})]
    text = models.Message(type="error", id="1", data={"error": "e"}).model_dump_json()
    print(json.dumps([Own.__pydantic_complete__, put_off, [kinds, data, refused, text]]))
"""


def test_pipecats_models_are_built_by_their_first_use_and_a_bots_own_at_once() -> None:
    own, put_off, deferred = run(MODELS)
    _, not_put_off, as_ever = run(MODELS, deferred=False)
    assert (own, put_off, not_put_off) == (True, True, False)
    assert deferred == as_ever
    assert deferred[2] == [True, True]


TRACING = """
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.utils.tracing import service_decorators
    from pipecat.utils.tracing.setup import is_tracing_available, setup_tracing
    def sdk():
        return any(name.startswith(("opentelemetry.sdk.", "opentelemetry.exporter.")) for name in sys.modules)
    available, before = is_tracing_available(), sdk()
"""


def test_pipecat_imports_nothing_of_the_sdk_of_opentelemetry_until_a_bot_sets_tracing_up() -> None:
    found = run(
        TRACING
        + """
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry import trace
    exporter = InMemorySpanExporter()
    done = setup_tracing("a-bot", exporter=exporter)
    trace.get_tracer("a-bot").start_span("turn").end()
    trace.get_tracer_provider().force_flush()
    names = [span.name for span in exporter.get_finished_spans()]
    print(json.dumps([available, before, done, names]))
    """
    )
    assert found == [True, False, True, ["turn"]]


def test_without_that_pipecat_imports_it_always() -> None:
    assert run(TRACING + "    print(json.dumps([available, before]))", deferred=False) == [True, True]


def test_a_bot_that_has_imported_the_sdk_itself_finds_pipecat_as_it_is() -> None:
    found = run(
        "from opentelemetry.sdk.resources import Resource\n"
        + textwrap.dedent(TRACING)
        + "from pipecat.utils.tracing import setup\n"
        + "print(json.dumps([available, setup.Resource is Resource]))"
    )
    assert found == [True, True]
