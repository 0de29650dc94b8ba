"""Where a server listens and who may use it: addresses, ports, TLS, and a secret for what changes the server.

Needs the standard library only, until a client is made.
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import re
import secrets
import socket
from pathlib import Path
from typing import Any

from ..errors import TargetUnavailableError, UsageError
from .tls import check_files, name_in

LOOPBACK = "127.0.0.1"
RESTRICTED = "shared-memory,model-repository,logging,trace"
"""What only the holder of the secret may use: what loads models, maps memory or changes the server."""

ADMIN_KEY = "enginesmith-admin"
CLIENT = "pip install 'tritonclient[grpc]'"
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.use_local_subchannel_pool", 1),  # a server that came back is not taken for one still away
)
"""Of every client: messages of any size, and a server that was away is soon found again."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """How a server can be reached. A port of 0 is a free one, and None is no such service.

    Attributes:
        cert: PEM file of the certificate, and of the chain to its root; TLS is used where it is given.
        key: PEM file of its private key.
        client_ca: PEM file of the roots that clients' certificates must come from; None asks clients for none.
        secret: of the restricted services; a random one where empty.
    """

    host: str = LOOPBACK
    port: int = 8001
    metrics_host: str = LOOPBACK
    metrics_port: int | None = 8002
    http_port: int | None = None
    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    secret: str = ""

    def resolved(self) -> Endpoint:
        """The same with real ports and a secret.

        Raises:
            UsageError: a port that is taken, an address that is not of this machine, TLS files that do not fit.
        """
        if (self.cert is None) != (self.key is None) or (self.client_ca and not self.cert):
            raise UsageError("TLS needs a certificate and its key", expected="--tls-cert and --tls-key")
        if self.cert and self.key:
            check_files(self.cert, self.key, self.client_ca)
        if self.cert and self.http_port is not None:
            raise UsageError("the server has TLS for gRPC only", found="--http-port", hint="leave out HTTP or TLS")
        if not re.fullmatch(r"[\w-]*", self.secret, re.ASCII):
            raise UsageError("the admin secret cannot be passed on", expected="letters, digits, - and _")
        taken: set[int] = set()
        port = _port(self.host, self.port, "--port", taken)
        metrics, http = self.metrics_port, self.http_port
        if metrics is not None:
            metrics = _port(self.metrics_host, metrics, "--metrics-port", taken)
        if http is not None:
            http = _port(self.host, http, "--http-port", taken)
        secret = self.secret or secrets.token_hex(16)
        return dataclasses.replace(self, port=port, metrics_port=metrics, http_port=http, secret=secret)

    def flags(self) -> list[str]:
        """TLS and the restricted services, as the server's flags."""
        flags = ["--grpc-restricted-protocol", f"{RESTRICTED}:{ADMIN_KEY}={self.secret}"]
        if self.http_port is not None:
            flags += ["--http-restricted-api", f"{RESTRICTED}:{ADMIN_KEY}={self.secret}"]
        if self.cert:
            flags += [
                "--grpc-use-ssl",
                "true",
                "--grpc-server-cert",
                str(self.cert),
                "--grpc-server-key",
                str(self.key),
            ]
        if self.client_ca:
            flags += ["--grpc-use-ssl-mutual", "true", "--grpc-root-cert", str(self.client_ca)]
        return flags

    @property
    def admin_headers(self) -> dict[str, str]:
        """What a client sends along to use the restricted services."""
        return {f"triton-grpc-protocol-{ADMIN_KEY}": self.secret}

    @property
    def url(self) -> str:
        """What a client on another machine connects to; on this machine where it listens on no other."""
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def exposed(self) -> bool:
        """Whether other machines reach it."""
        return not _is_loopback(self.host)

    def client(self) -> Any:
        """A client on this machine, of tritonclient.

        Raises:
            TargetUnavailableError: tritonclient is missing.
        """
        try:
            import grpc
            from tritonclient.grpc import InferenceServerClient
        except ImportError as error:
            raise TargetUnavailableError(f"no client for the server: {error}", hint=CLIENT) from error
        address = ipaddress.ip_address(self.host) if re.fullmatch(r"[\d.]+|.*:.*", self.host) else None
        local = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(str(address), self.host)
        url = f"{_bracketed(local)}:{self.port}"
        options: list[tuple[str, Any]] = [*CHANNEL_OPTIONS, ("grpc.max_reconnect_backoff_ms", 500)]
        if not (self.cert and self.key):
            return InferenceServerClient(url, channel_args=options)
        cert, key = self.cert.read_bytes(), self.key.read_bytes()
        own = (key, cert) if self.client_ca else (None, None)
        trusted = grpc.ssl_channel_credentials(cert, *own)
        options.append(("grpc.ssl_target_name_override", name_in(self.cert, self.key)))
        return InferenceServerClient(url, ssl=True, creds=trusted, channel_args=options)


def _port(host: str, port: int, option: str, taken: set[int]) -> int:
    """The port, or a free one for 0, once it is seen that it can be had."""
    if port in taken:
        raise UsageError(f"port {port} is given twice", found=option)
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed server's port may be had at once
            trial.bind(address)
            found = int(trial.getsockname()[1])
    except OSError as error:
        raise UsageError(
            f"cannot listen on {_bracketed(host)}:{port}: {error.strerror}",
            found=option if port else None,
            hint=f"{option} 0 takes a free port" if error.errno == errno.EADDRINUSE else None,
        ) from error
    taken.add(found)
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
