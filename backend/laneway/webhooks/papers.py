"""What an attempt shows the receiver: signatures, headers of the owner's own, a client certificate.

Opened only for the attempt: at rest, and while a delivery waits in this process, all of it is sealed.
"""

from __future__ import annotations

import json
import os
import ssl
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from laneway.webhooks import asymmetric
from laneway.webhooks.deliveries import Claimed
from laneway.webhooks.secrets import SecretBox, tenant_context
from laneway.webhooks.signing import sign, signature_headers

KEPT_CONTEXTS = 100


@dataclass(frozen=True, slots=True)
class Papers:
    """The opened secrets of one delivery."""

    secrets: Sequence[str] = field(repr=False)  # newest first
    private_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    certificate: str | None = field(default=None, repr=False)

    @classmethod
    def open(cls, delivery: Claimed, box: SecretBox) -> Papers:
        """Raises ValueError when a key is missing or a sealed text was tampered with."""
        manner = delivery.manner
        tenant = tenant_context(delivery.tenant_id)
        if manner.id is None:
            if not delivery.sealed_tenant_secrets:
                raise ValueError("there is no such tenant any more")
            return cls([box.open(each, tenant) for each in delivery.sealed_tenant_secrets])
        context = endpoint_context(manner.id)
        private_key = None
        if manner.sign_with != "v1":
            private_key = box.open(delivery.sealed_signing_key or "", signing_key_context(delivery.tenant_id))
        return cls(
            [box.open(each, context) for each in manner.sealed_secrets] if manner.sign_with != "v1a" else (),
            private_key,
            json.loads(box.open(manner.sealed_headers, context)) if manner.sealed_headers else {},
            box.open(manner.sealed_certificate, context) if manner.sealed_certificate else None,
        )

    def signatures(self, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """The headers that prove who sent these bytes, at this second."""
        made = [sign(secret, message_id, timestamp, body) for secret in self.secrets]
        if self.private_key is not None:
            made.append(asymmetric.sign(self.private_key, message_id, timestamp, body))
        return signature_headers(made, message_id=message_id, timestamp=timestamp)


def endpoint_context(endpoint_id: str) -> str:
    """The context under which an endpoint's secrets, headers and certificate are sealed."""
    return f"webhook_endpoints/{endpoint_id}"


def signing_key_context(tenant_id: str) -> str:
    """The context under which `tenants.webhook_signing_key` is sealed."""
    return f"tenants/{tenant_id}/webhook_signing_key"


class TlsContexts:
    """TLS contexts, each of which takes some 30 ms to make: one for all, one for each endpoint of its own."""

    def __init__(self) -> None:
        self._own: OrderedDict[tuple[str, int], ssl.SSLContext] = OrderedDict()

    @cached_property
    def default(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def context(self, delivery: Claimed, papers: Papers) -> ssl.SSLContext:
        """Raises ValueError or ssl.SSLError for a certificate that cannot be used."""
        manner = delivery.manner
        if manner.id is None or (papers.certificate is None and manner.ca_certificate is None):
            return self.default
        key = (manner.id, manner.version)
        if key in self._own:
            self._own.move_to_end(key)
        else:
            self._own[key] = make_context(papers.certificate, manner.ca_certificate)
            if len(self._own) > KEPT_CONTEXTS:
                self._own.popitem(last=False)
        return self._own[key]


def make_context(certificate: str | None, ca_certificate: str | None) -> ssl.SSLContext:
    """A context that shows `certificate` (PEM: certificate, then key) and also trusts `ca_certificate` (PEM).

    Verifying the receiver cannot be turned off. Raises ssl.SSLError.
    """
    context = ssl.create_default_context()
    load_certificates(context, certificate=certificate, ca_certificate=ca_certificate)
    return context


def load_certificates(
    context: ssl.SSLContext, *, certificate: str | None = None, ca_certificate: str | None = None
) -> None:
    """Raises ssl.SSLError, ValueError or TypeError for what is no PEM, or whose key is encrypted."""
    if ca_certificate is not None:
        context.load_verify_locations(cadata=ca_certificate)
    if certificate is not None:
        # Python reads a key from a file only: one in memory, gone before anybody else could open it.
        descriptor = os.memfd_create("laneway-client-certificate")
        try:
            os.write(descriptor, certificate.encode())
            # With a password, if a wrong one, OpenSSL does not ask the terminal for it.
            context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
        finally:
            os.close(descriptor)
