"""Whom the API server sends requests through: its front proxy, by the ConfigMap that every cluster keeps for extension API servers. Pure.

The API server has authenticated and authorised a request before it passes it on, and speaks as itself: with a client certificate of the request header
authority, under one of the allowed names. Source: "Configure the Aggregation Layer" in Kubernetes' documentation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMESPACE = "kube-system"
NAME = "extension-apiserver-authentication"


class FrontProxyError(Exception):
    """The cluster does not say how its front proxy is recognised; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class FrontProxy:
    """How the front proxy is recognised."""

    authority: str
    """PEM: who signs its certificate."""
    names: frozenset[str]
    """Its common names; empty: whoever has a certificate of the authority."""

    @classmethod
    def from_config_map(cls, config_map: Mapping[str, Any]) -> FrontProxy:
        """Read the ConfigMap ``kube-system/extension-apiserver-authentication``.

        Raises:
            FrontProxyError: nobody could be told from the front proxy.
        """
        data: Mapping[str, str] = config_map.get("data") or {}
        authority = data.get("requestheader-client-ca-file", "")
        if "BEGIN CERTIFICATE" not in authority:
            raise FrontProxyError(
                f"The ConfigMap {NAMESPACE}/{NAME} has no requestheader-client-ca-file: "
                "the API server runs without an aggregation layer (--requestheader-client-ca-file)."
            )
        try:
            names = json.loads(data.get("requestheader-allowed-names") or "[]")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("not a list of names")
        except ValueError as error:
            raise FrontProxyError(
                f"requestheader-allowed-names in the ConfigMap {NAMESPACE}/{NAME} cannot be read: {error}."
            ) from None
        return cls(authority, frozenset(names))

    def is_it(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether this is the certificate of the front proxy.

        Args:
            certificate: as ``ssl.SSLSocket.getpeercert`` gives it, verified against the authority; None: there was none.
        """
        if not certificate:
            return False
        return not self.names or bool(self.names & set(_common_names(certificate.get("subject") or ())))


def _common_names(subject: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    return [value for part in subject for key, value in part if key == "commonName"]
