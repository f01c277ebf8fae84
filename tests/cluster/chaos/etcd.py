"""Asks etcd to compact its history, over its JSON gateway."""

from __future__ import annotations

import base64

import aiohttp

ALREADY_COMPACTED = 400


async def compact(http: aiohttp.ClientSession, address: str) -> int:
    """Throw away all history up to now; the revision that is left.

    Raises:
        aiohttp.ClientResponseError: etcd would not.
    """
    key = base64.b64encode(b"/registry/ranges/serviceips").decode()
    async with http.post(f"{address}/v3/kv/range", json={"key": key, "keys_only": True}) as answer:
        answer.raise_for_status()
        revision = int((await answer.json())["header"]["revision"])
    async with http.post(f"{address}/v3/kv/compaction", json={"revision": str(revision)}) as answer:
        # Nothing may have been written since the last time, by whomever it was done.
        if answer.status != ALREADY_COMPACTED:
            answer.raise_for_status()
    return revision
