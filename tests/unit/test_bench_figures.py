from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.audit import AuditLog, writes
from tests.bench.figures import (
    Figure,
    blocks,
    delays,
    of_quantile,
    over_rounds,
    per_event,
    quantile,
    ratio_of_quantiles,
    ratio_over_rounds,
)
from tests.bench.report import Row, document, number, table

VALUES = st.lists(st.floats(0.001, 1000), min_size=1, max_size=50)


@given(VALUES, st.floats(0.001, 1))
def test_a_quantile_is_a_value_that_was_seen_and_that_its_share_does_not_exceed(
    values: list[float], share: float
) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_there_is_no_quantile_of_nothing_or_of_no_share(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        quantile(values, share)


@given(VALUES, st.integers(1, 50))
def test_blocks_are_all_values_in_their_order_and_of_nearly_one_length(values: list[float], count: int) -> None:
    if count > len(values):
        with pytest.raises(ValueError, match="do not make"):
            blocks(values, count)
        return
    found = blocks(values, count)
    assert [value for block in found for value in block] == values
    assert len(found) == count
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_ratio_is_of_the_whole_and_its_spread_of_the_blocks() -> None:
    floor = [1.0, 1.0, 2.0, 2.0]
    values = [1.0, 1.0, 4.0, 4.0]
    assert ratio_of_quantiles(values, floor, 1.0, block_count=2) == Figure(2.0, 1.0, 2.0, 4)


def test_a_ratio_needs_a_floor_for_each_value() -> None:
    with pytest.raises(ValueError, match="beside"):
        ratio_of_quantiles([1.0, 2.0], [1.0], 0.5)


def test_a_machine_that_is_slow_in_one_round_does_not_change_the_ratio_of_rounds() -> None:
    assert ratio_over_rounds([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Figure(2.0, 2.0, 2.0, 3)


def test_rounds_give_their_median_and_their_extremes() -> None:
    assert over_rounds([3.0, 1.0, 2.0]) == Figure(2.0, 1.0, 3.0, 3)


def test_a_quantile_has_the_spread_of_its_blocks() -> None:
    assert of_quantile([1.0, 2.0, 3.0, 4.0], 0.5, block_count=2) == Figure(2.0, 1.0, 3.0, 4)


def test_what_a_process_uses_when_nothing_happens_is_not_counted_for_events() -> None:
    assert per_event(0.3, idle_share=0.05, wall_seconds=2.0, events=1000) == pytest.approx(0.0002)
    assert per_event(0.1, idle_share=0.1, wall_seconds=2.0, events=10) == 0


def test_the_first_effect_belongs_to_the_first_cause() -> None:
    assert delays([10.0, 20.0], [21.5, 11.0]) == [1.0, 1.5]
    with pytest.raises(ValueError, match="1 effects of 2 causes"):
        delays([1.0, 2.0], [3.0])


def test_a_goal_is_met_by_the_figure_itself_and_not_by_its_spread() -> None:
    assert Row("b", "what", Figure(1.0, 0.5, 3.0, 4), "x", goal=1.0).met is True
    assert Row("b", "what", Figure(1.1, 0.5, 3.0, 4), "x", goal=1.0).met is False
    assert Row("b", "what", Figure(1.1, 0.5, 3.0, 4), "x").met is None


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1.234, "1.23"), (45.67, "45.7"), (1234.5, "1234")])
def test_numbers_have_three_digits_that_matter(value: float, text: str) -> None:
    assert number(value) == text


def test_a_table_shows_what_was_missed() -> None:
    rows = [
        Row("bind", "good", Figure(1.0, 0.9, 1.1, 5), "x", 1.5, "6 ms, floor 6 ms", 0.3),
        Row("bind", "bad", Figure(2.0, 2.0, 2.0, 1), "x", 1.5),
    ]
    header, line, good, bad = table(rows).splitlines()
    assert len({len(header), len(line), len(good), len(bad)}) == 1
    assert "0.90 to 1.10" in good
    assert "| met " in good
    assert "| MISSED |" in bad


def test_the_document_says_which_goals_are_met() -> None:
    row = Row("bind", "bad", Figure(2.0, 2.0, 2.0, 1), "x", 1.5)
    (result,) = json.loads(json.dumps(document([row], {"processors": 2})))["results"]
    assert result["met"] is False
    assert result["figure"]["value"] == 2.0


def entry(verb: str, name: str, at: int, **changes: Any) -> str:
    """A line of an audit log: asked for at that second, answered half a second later."""
    line: dict[str, Any] = {
        "stage": "ResponseComplete",
        "verb": verb,
        "requestURI": "/api/v1/namespaces/calls/pods",
        "objectRef": {"resource": "pods", "namespace": "calls"},
        "responseStatus": {"code": 200},
        "responseObject": {"metadata": {"name": name}},
        "requestReceivedTimestamp": f"1970-01-01T00:00:{at:02}.000000Z",
        "stageTimestamp": f"1970-01-01T00:00:{at:02}.500000Z",
    }
    return json.dumps(line | changes) + "\n"


def test_of_the_audit_log_only_accepted_writes_of_pods_count() -> None:
    refused = {"responseStatus": {"code": 422}}
    status = {"objectRef": {"resource": "pods", "namespace": "calls", "name": "a", "subresource": "status"}}
    elsewhere = {"objectRef": {"resource": "pods", "namespace": "other"}}
    lines = [
        entry("create", "a", 1),
        entry("create", "b", 2, requestURI="/api/v1/namespaces/calls/pods?dryRun=All"),
        entry("patch", "a", 3, **status),
        entry("patch", "a", 4, **refused),
        entry("create", "c", 5, **elsewhere),
        entry("delete", "a", 6),
        entry("patch", "a", 7, objectRef={"resource": "pods", "namespace": "calls", "name": "a"}),
    ]
    found = writes("".join(lines), "calls")
    assert [(write.verb, write.name, write.asked_at, write.answered_at) for write in found] == [
        ("create", "a", 1.0, 1.5),
        ("patch", "a", 7.0, 7.5),
    ]


def test_an_audit_log_is_read_from_where_it_was_opened_and_only_by_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_text(entry("create", "before", 1))
    with contextlib.closing(AuditLog(path)) as log:
        with path.open("a") as file:
            file.write(entry("create", "after", 2) + '{"stage": "Respo')
        assert [write.name for write in log.writes("calls")] == ["after"]


def test_an_audit_log_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_text("")
    with contextlib.closing(AuditLog(path)) as log:
        path.write_text(entry("create", "old", 1))
        path.rename(tmp_path / "audit-1.log")
        path.write_text(entry("create", "new", 2))
        assert [write.name for write in log.writes("calls")] == ["old", "new"]
        assert [write.name for write in log.writes("calls")] == ["old", "new"]
