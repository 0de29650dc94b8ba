"""Checks the files of a TLS server by a handshake in memory, before a server is started on them."""

from __future__ import annotations

import ssl
from pathlib import Path

from ..errors import UsageError


def check_files(cert: Path, key: Path, client_ca: Path | None = None) -> None:
    """Refuses a certificate, key or root that no server could use.

    Raises:
        UsageError: a file is missing or no PEM file, the key is another's, the certificate is out of its time, or does
            not come from the clients' roots: it is what the server's own probes show.
    """
    for option, path in (("--tls-cert", cert), ("--tls-key", key), ("--tls-client-ca", client_ca)):
        if path and not path.is_file():
            raise UsageError(f"{path} is missing", found=option)
    _shake(cert, key, client_ca)


def name_in(cert: Path, key: Path) -> str:
    """A host name that the certificate is for: what a client on this machine has to expect."""
    names = _shake(cert, key).get("subjectAltName", ())
    assert isinstance(names, tuple)
    found = [str(value) for kind, value in names if kind in ("DNS", "IP Address")]
    return found[0].replace("*", "any", 1) if found else "localhost"


def _shake(cert: Path, key: Path, client_ca: Path | None = None) -> dict[str, object]:
    """What the certificate says, as a client sees it that trusts it, and that shows it where it is asked for one."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        reason = "the key is that of another certificate" if "MISMATCH" in str(error) else _reason(error)
        raise UsageError(
            f"TLS cannot use {cert} with {key}: {reason}",
            expected="PEM files of a certificate (with its chain) and of its private key, without a password",
        ) from error
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if client_ca:
        server.verify_mode = ssl.CERT_REQUIRED
        try:
            server.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise UsageError(f"{client_ca} holds no certificates: {_reason(error)}", found="--tls-client-ca") from error
        server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        client.load_cert_chain(cert, key, password=lambda: b"")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=None),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(3):
        for side in sides:
            _step(side, cert, client_ca if side.server_side else None)
    return dict(sides[0].getpeercert() or {})


def _step(side: ssl.SSLObject, cert: Path, roots: Path | None) -> None:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLCertVerificationError as error:
        if roots:
            raise UsageError(
                f"the server's own probes show {cert}, which clients' roots in {roots} do not sign",
                found=error.verify_message,
                hint="add its root to the file of --tls-client-ca",
            ) from error
        raise UsageError(f"clients will refuse {cert}: {error.verify_message}", found="--tls-cert") from error


def _reason(error: ssl.SSLError) -> str:
    return error.reason.replace("_", " ").lower() if error.reason else "they are not such files"
