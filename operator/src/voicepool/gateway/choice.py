"""Which pools a start is about: one by its name, several in an order of preference, or those that a label selector matches. Reads the view, decides, no I/O.

Invariants: all pools of one start are of one namespace, since that is where the pod of a session is looked for; what the session id of an Idempotency-Key is
made of does not depend on which pools there are at the moment, so that every gateway makes the same.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from voicepool.gateway import label_selector
from voicepool.gateway.auth import Caller
from voicepool.gateway.errors import BadRequest, PoolNotFound
from voicepool.gateway.label_selector import Selector
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.view import ClusterView, PoolKey

_KEYED_SESSIONS = uuid.UUID("6b0f4c0a-9d3d-5c6a-8f5b-0c6d3d1f5a11")
"""Namespace of the session ids that are derived from an Idempotency-Key; any constant would do."""
_ANY_POOL = ""
"""Stands for the pool in the session id of a start that may be given one of several."""


_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def require_possible(key: PoolKey) -> None:
    """Refuse what Kubernetes takes neither as a namespace nor as a name, before anybody is asked about it.

    Raises:
        PoolNotFound: there can be no such pool.
    """
    namespace, name = key
    if not _NAMESPACE.fullmatch(namespace) or not _NAME.fullmatch(name):
        raise PoolNotFound(f"There can be no VoiceAgentPool {namespace[:64]}/{name[:64]}.")


@dataclass(frozen=True, slots=True)
class Choice:
    """The pools that will do, the best first."""

    namespace: str
    pools: tuple[str, ...]
    scope: str
    """The pool, or nothing where it may be one of several: one Idempotency-Key is one session within it."""

    def session_id(self, caller: Caller, idempotency_key: str) -> str:
        """The id of a new session; the same for the same key of the same caller."""
        if not idempotency_key:
            return str(uuid.uuid4())
        # One caller's keys are not another's, and the same key means another session in another pool.
        parts = (caller.name, self.namespace, self.scope, idempotency_key)
        return str(uuid.uuid5(_KEYED_SESSIONS, "\0".join(parts)))


class Chooser:
    """Finds the pools that a caller means.

    Args:
        view: the pools that there are.
        options: the default pool and namespace.
    """

    def __init__(self, view: ClusterView, options: GatewayOptions) -> None:
        self._view = view
        self._options = options

    def key(self, name: str) -> PoolKey:
        """``name`` in the default namespace, or ``namespace.name``."""
        own = (self._options.default_namespace, name)
        if own in self._view.pools or "." not in name:
            return own
        namespace, _, rest = name.partition(".")
        return (namespace, rest)

    async def one(self, caller: Caller, key: PoolKey) -> Choice:
        """One pool.

        Raises:
            NotAllowed: it is not the caller's.
            PoolNotFound: nothing can have this name.
        """
        require_possible(key)
        await caller.require(*key)
        return Choice(key[0], (key[1],), key[1])

    async def default(self, caller: Caller) -> Choice:
        """The pool of somebody who names none.

        Raises:
            PoolNotFound: there is no default, and not just one pool.
        """
        if self._options.default_pool:
            return await self.one(caller, self.key(self._options.default_pool))
        mine = await caller.usable(self._view.pools)
        if len(mine) == 1:
            return await self.one(caller, mine[0])
        many = "There are several pools" if mine else "There is no pool yet"
        raise PoolNotFound(f"{many}; name one as 'pool' in the body or the query ('name' or 'namespace.name').")

    async def several(self, caller: Caller, names: Sequence[str]) -> Choice:
        """Pools by their names, the best first.

        Raises:
            NotAllowed: one of them is not the caller's.
            BadRequest: they are of several namespaces.
            PoolNotFound: one of them does not exist; a mistyped one would go unnoticed for as long as the others have agents.
        """
        keys = list(dict.fromkeys(self.key(name) for name in names))
        for key in keys:
            require_possible(key)
            await caller.require(*key)
        if len({namespace for namespace, _ in keys}) > 1:
            raise BadRequest(
                f"The pools {', '.join(f'{namespace}/{name}' for namespace, name in keys)} are of several namespaces; name pools of one namespace."
            )
        if len(keys) == 1:
            return await self.one(caller, keys[0])
        if missing := [f"{namespace}/{name}" for namespace, name in keys if (namespace, name) not in self._view.pools]:
            raise PoolNotFound(f"There is no VoiceAgentPool {' and none '.join(missing)}.")
        return Choice(keys[0][0], tuple(name for _, name in keys), _ANY_POOL)

    async def selected(self, caller: Caller, selector: Selector, namespace: str | None) -> Choice:
        """The caller's pools of a namespace that have some labels, by their names.

        Raises:
            BadRequest: the selector cannot be read.
            PoolNotFound: none has them.
        """
        try:
            requirements = label_selector.parse(selector)
        except ValueError as error:
            raise BadRequest(f"selector: {error}.") from None
        where = namespace or self._options.default_namespace
        matching = sorted(
            key
            for key, pool in self._view.pools.items()
            if pool.namespace == where and not pool.deleting and label_selector.matches(requirements, pool.labels)
        )
        names = [name for _, name in await caller.usable(matching)]
        if not names:
            raise PoolNotFound(
                f"No pool of the namespace {where} that the caller {caller.name!r} may use has the labels of the selector; "
                "label one (kubectl label vpool), or name pools."
            )
        return Choice(where, tuple(names), _ANY_POOL)
