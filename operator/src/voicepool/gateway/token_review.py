"""Callers with a ServiceAccount's token: the API server says whose it is (TokenReview), and RBAC which pools they may use (SubjectAccessReview).

An account may use a pool where it may ``create`` the (virtual) subresource ``voiceagentpools/sessions`` of it. Invariants: a token is good only if the
API server says so for this gateway's audience and for a ServiceAccount; answers are kept for `KEPT_SECONDS` under a hash of the token, in bounded memory,
so that is how long a withdrawn right may go on; an answer that did not come within `REVIEW_SECONDS` is neither yes nor no; one question at a time is under way
for one token, and for one account and pool.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from voicepool.gateway.auth import Caller
from voicepool.gateway.errors import ClusterUnavailable, Unauthenticated
from voicepool.kube.api import Forbidden, Json, KubeApi, KubeApiError, Resource

TOKEN_REVIEWS = Resource("authentication.k8s.io", "v1", "tokenreviews")
ACCESS_REVIEWS = Resource("authorization.k8s.io", "v1", "subjectaccessreviews")

KEPT_SECONDS = 30.0
MAX_KEPT = 4096
REVIEW_SECONDS = 5.0
PARALLEL_REVIEWS = 8
"""Questions to the API server at the same time; whoever comes with bad tokens does not keep it busy."""
SERVICE_ACCOUNT_PREFIX = "system:serviceaccount:"

T = TypeVar("T")


class _Kept(Generic[T]):
    """Answers for a while. Whoever asks the same meanwhile waits for the same answer; one that failed is not kept."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._answers: OrderedDict[Hashable, tuple[float, T]] = OrderedDict()
        self._under_way: dict[Hashable, asyncio.Task[T]] = {}

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        known = self._answers.get(key)
        if known is not None and self._monotonic() < known[0]:
            return known[1]
        asking = self._under_way.get(key)
        if asking is None:
            asking = self._under_way[key] = asyncio.create_task(self._ask(key, ask))
            asking.add_done_callback(lambda task: self._over(key, task))
        # The others wait on when one of them goes.
        return await asyncio.shield(asking)

    def _over(self, key: Hashable, task: asyncio.Task[T]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            # All who asked may have gone; then nobody else looks at what went wrong.
            task.exception()

    async def _ask(self, key: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        answer = await ask()
        self._answers[key] = (self._monotonic() + KEPT_SECONDS, answer)
        self._answers.move_to_end(key)
        if len(self._answers) > MAX_KEPT:
            self._answers.popitem(last=False)
        return answer


@dataclass(frozen=True, slots=True)
class _Account:
    """What the API server says of a token's owner."""

    username: str
    uid: str
    groups: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True, slots=True)
class _Reviewed:
    """The scope of an account, which RBAC decides."""

    reviews: TokenReviews = field(repr=False)
    account: _Account

    async def allows(self, namespace: str, pool: str) -> bool:
        return await self.reviews.may_use(self.account, namespace, pool)


class TokenReviews:
    """Asks the API server about tokens and accounts.

    Args:
        kube: the API server.
        audience: for whom the tokens must be.
        monotonic: seconds that never go back.
    """

    def __init__(self, kube: KubeApi, audience: str, *, monotonic: Callable[[], float]) -> None:
        self._kube = kube
        self.audience = audience
        self._accounts: _Kept[_Account | None] = _Kept(monotonic)
        self._rights: _Kept[bool] = _Kept(monotonic)
        self._parallel = asyncio.Semaphore(PARALLEL_REVIEWS)

    async def authenticate(self, token: str) -> Caller:
        """Whose token this is.

        Raises:
            Unauthenticated: the API server does not know it, or it is for another audience.
            ClusterUnavailable: the API server does not say.
        """
        digest = hashlib.sha256(token.encode()).digest()
        account = await self._accounts.get(digest, lambda: self._review(token))
        if account is None:
            raise Unauthenticated("The API server does not accept this token of a ServiceAccount for this gateway.")
        return Caller(name=account.username, scope=_Reviewed(self, account))

    async def may_use(self, account: _Account, namespace: str, pool: str) -> bool:
        """Whether RBAC lets an account create sessions of a pool.

        Raises:
            ClusterUnavailable: the API server does not say.
        """
        return await self._rights.get((account, namespace, pool), lambda: self._ask(account, namespace, pool))

    async def _review(self, token: str) -> _Account | None:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self.audience]},
        }
        status = (await self._create(TOKEN_REVIEWS, body)).get("status") or {}
        user = status.get("user") or {}
        username = user.get("username") or ""
        if (
            status.get("authenticated") is not True
            # An authenticator that knows nothing of audiences leaves them out, and the token may be for anybody.
            or self.audience not in (status.get("audiences") or ())
            or not username.startswith(SERVICE_ACCOUNT_PREFIX)
        ):
            return None
        return _Account(username, user.get("uid") or "", tuple(user.get("groups") or ()), user.get("extra") or {})

    async def _ask(self, account: _Account, namespace: str, pool: str) -> bool:
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": account.username,
                "uid": account.uid,
                "groups": list(account.groups),
                "extra": dict(account.extra),
                "resourceAttributes": {
                    "group": "voicepool.dev",
                    "version": "*",
                    "resource": "voiceagentpools",
                    "subresource": "sessions",
                    "verb": "create",
                    "namespace": namespace,
                    "name": pool,
                },
            },
        }
        status = (await self._create(ACCESS_REVIEWS, body)).get("status") or {}
        return status.get("allowed") is True and status.get("denied") is not True

    async def _create(self, resource: Resource, body: Json) -> Json:
        try:
            # Those that are before it count.
            async with asyncio.timeout(REVIEW_SECONDS), self._parallel:
                # Reviews are of no namespace.
                return await self._kube.create(resource, "", body)
        except Forbidden:
            raise ClusterUnavailable(
                f"The gateway's account may not create {resource.plural}; install the chart with access.tokenReview.audience.",
                retry_after_seconds=30,
            ) from None
        except (KubeApiError, TimeoutError) as error:
            raise ClusterUnavailable(
                f"The Kubernetes API did not review a token or its rights ({type(error).__name__}).",
                retry_after_seconds=2,
            ) from None
