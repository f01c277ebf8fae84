"""The deployed gateway does what its OpenAPI document says, whatever comes: made-up requests to every route, with a key and without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.e2e.deployment import Deployment, Key, add_key, remove_key
from tests.e2e.pools import MakePool, light
from tests.openapi import configuration, hold

pytestmark = pytest.mark.cluster

POOL = "openapi"
DEADLINE_SECONDS = 150.0
"""Of one run, after which something hangs."""


@pytest.fixture
async def key(deployment: Deployment) -> AsyncIterator[Key]:
    """For this pool alone: what is made up can start and end nobody else's sessions."""
    made = await asyncio.to_thread(add_key, deployment, POOL, f"default/{POOL}")
    yield made
    await asyncio.to_thread(remove_key, deployment, made)


@pytest.mark.parametrize("with_key", [True, False], ids=["with a key", "without one"])
async def test_every_route_answers_as_the_document_says(
    deployment: Deployment, make_pool: MakePool, key: Key, tmp_path: Path, with_key: bool
) -> None:
    pool = await make_pool(
        POOL,
        light(LIGHT_BOT_ROUTES="yes"),
        replicas=2,
        maxPods=4,
        onEmpty={"policy": "Reject"},
        session={"joinTimeoutSeconds": 5, "retentionSeconds": 5},
    )
    chosen = configuration(
        key=key.value if with_key else None,
        pools=[pool, f"default.{pool}"],
        namespaces=["default"],
        examples=8 if with_key else 3,
        phases=["fuzzing", "stateful"],
        stream_seconds=2.0,
    )
    code, said = await hold(
        deployment.gateway_url,
        tmp_path,
        key=key.value if with_key else None,
        deadline_seconds=DEADLINE_SECONDS,
        settings=chosen,
    )
    assert code == 0, said
