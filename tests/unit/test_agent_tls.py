"""One TLS context for all connections of a bot's services, made before the bind."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from websockets.asyncio.server import Server, ServerConnection, serve

from voicepool_agent import pipecat_private


class Authority:
    """A certificate authority that nobody else knows, and its certificate for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .sign(key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )
        file = folder / "server.pem"
        file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate)
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(file)
        self.client = ssl.create_default_context(cadata=certificate.decode())


def address(server: Server) -> str:
    """Where it listens."""
    host, port = next(iter(server.sockets)).getsockname()[:2]
    return f"{host}:{port}"


async def accept(connection: ServerConnection) -> None:
    """Keep a connection for as long as the other side does."""
    await connection.wait_closed()


async def test_a_service_connects_with_the_context_that_it_was_given_and_without_tls_as_before(tmp_path: Path) -> None:
    authority, service = Authority(tmp_path), AssemblyAISTTService(api_key="a-key")
    worker = PipelineWorker(Pipeline([service]))
    async with (
        serve(accept, "127.0.0.1", 0, ssl=authority.server) as secure,
        serve(accept, "127.0.0.1", 0) as plain,
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            await service._websocket_connect(f"wss://{address(secure)}")
        pipecat_private.share_tls_context(worker, authority.client)
        for url in (f"wss://{address(secure)}", f"ws://{address(plain)}"):
            connection = await service._websocket_connect(url)
            await connection.close()


async def test_a_context_of_the_services_own_is_kept(tmp_path: Path) -> None:
    authority, service = Authority(tmp_path), AssemblyAISTTService(api_key="a-key")
    pipecat_private.share_tls_context(PipelineWorker(Pipeline([service])), ssl.create_default_context())
    async with serve(accept, "127.0.0.1", 0, ssl=authority.server) as secure:
        connection = await service._websocket_connect(f"wss://{address(secure)}", ssl=authority.client)
        await connection.close()
