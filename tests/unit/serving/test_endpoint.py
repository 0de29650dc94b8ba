from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from enginesmith.errors import UsageError
from enginesmith.serving.endpoint import Endpoint
from enginesmith.serving.tls import check_files, name_in


def free(**options: object) -> Endpoint:
    return Endpoint(**{"port": 0, "metrics_port": 0, **options})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """cert.pem with key.pem, and other.pem with other-key.pem."""
    folder = tmp_path_factory.mktemp("tls")
    for cert, key, days in (("cert", "key", 2), ("other", "other-key", 2)):
        command = (
            f"openssl req -x509 -newkey rsa:2048 -nodes -days {days} -subj /CN=x -keyout {key}.pem -out {cert}.pem"
        )
        names = ["-addext", "subjectAltName=DNS:*.example.org,DNS:second"]
        try:
            subprocess.run([*command.split(), *names], check=True, capture_output=True, cwd=folder)
        except FileNotFoundError:
            pytest.skip("no openssl to make certificates with")
    return folder


def test_free_ports_and_a_secret_are_chosen(files):
    found = free(http_port=0).resolved()
    ports = {found.port, found.metrics_port, found.http_port}
    assert len(ports) == 3
    assert all(ports)
    assert len(found.secret) == 32
    assert found.secret != free().resolved().secret


def test_what_was_given_stays():
    found = free(metrics_port=None, secret="abc-1").resolved()
    assert (found.metrics_port, found.http_port, found.secret) == (None, None, "abc-1")


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use") as refused:
            free(port=port).resolved()
    assert (refused.value.found, refused.value.hint) == ("--port", "--port 0 takes a free port")
    assert refused.value.exit_code == 2


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UsageError, match=r"cannot listen on 192.0.2.1:0: Cannot assign requested address"):
        free(host="192.0.2.1").resolved()


def test_one_port_for_two_services_is_refused():
    port = free().resolved().port
    with pytest.raises(UsageError, match=f"port {port} is given twice"):
        Endpoint(port=port, metrics_port=port).resolved()


def test_a_secret_that_the_server_would_misread_is_refused():
    with pytest.raises(UsageError, match="the admin secret cannot be passed on"):
        free(secret="a=b").resolved()


def test_clients_roots_that_do_not_sign_the_servers_own_certificate_are_refused(files):
    cert, key, others = files / "cert.pem", files / "key.pem", files / "other.pem"
    with pytest.raises(UsageError, match=r"the server's own probes show .* do not sign"):
        check_files(cert, key, others)
    both = files / "both.pem"
    both.write_text(cert.read_text() + others.read_text())
    check_files(cert, key, both)


@pytest.mark.parametrize("options", [{"cert": Path("c")}, {"key": Path("k")}, {"client_ca": Path("r")}])
def test_half_of_tls_is_refused(options):
    with pytest.raises(UsageError, match="TLS needs a certificate and its key"):
        free(**options).resolved()


def test_http_beside_tls_is_refused_as_it_would_be_open(files):
    with pytest.raises(UsageError, match="the server has TLS for gRPC only"):
        free(cert=files / "cert.pem", key=files / "key.pem", http_port=0).resolved()


def test_restricted_services_need_the_secret():
    flags = " ".join(free(secret="s3").resolved().flags())
    assert flags == "--grpc-restricted-protocol shared-memory,model-repository,logging,trace:enginesmith-admin=s3"
    assert "--http-restricted-api" in free(http_port=0).resolved().flags()
    assert free(secret="s3").admin_headers == {"triton-grpc-protocol-enginesmith-admin": "s3"}


def test_tls_becomes_flags(files):
    tls = {"cert": files / "cert.pem", "key": files / "key.pem", "client_ca": files / "cert.pem"}
    flags = " ".join(free(**tls).resolved().flags())
    assert f"--grpc-use-ssl true --grpc-server-cert {files}/cert.pem --grpc-server-key {files}/key.pem" in flags
    assert f"--grpc-use-ssl-mutual true --grpc-root-cert {files}/cert.pem" in flags


@pytest.mark.parametrize(
    ("cert", "key", "reason"),
    [
        ("cert", "other-key", "the key is that of another certificate"),
        ("key", "cert", "they are not such files"),
        ("missing", "key", "missing.pem is missing"),
    ],
)
def test_files_that_do_not_fit_are_refused(files, cert, key, reason):
    with pytest.raises(UsageError, match=reason):
        check_files(files / f"{cert}.pem", files / f"{key}.pem")


def test_roots_that_hold_no_certificate_are_refused(files):
    with pytest.raises(UsageError, match=r"key.pem holds no certificates"):
        check_files(files / "cert.pem", files / "key.pem", files / "key.pem")


def test_the_name_to_expect_is_the_certificates(files):
    assert name_in(files / "cert.pem", files / "key.pem") == "any.example.org"


@pytest.mark.parametrize(
    ("host", "exposed", "url"),
    [
        ("127.0.0.1", False, "127.0.0.1:1"),
        ("localhost", False, "localhost:1"),
        ("::1", False, "[::1]:1"),
        ("0.0.0.0", True, "0.0.0.0:1"),
        ("gpu-7", True, "gpu-7:1"),
    ],
)
def test_it_knows_whether_others_reach_it(host, exposed, url):
    endpoint = Endpoint(host=host, port=1)
    assert (endpoint.exposed, endpoint.url) == (exposed, url)
