"""Options of `serve`, its log, and what it says when the server answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ...serving.endpoint import LOOPBACK, Endpoint
from ...serving.launch import Watching
from ...serving.serve import serve
from ..engine import read_manifest
from ..signature import Signature
from .serving import serving_of, serving_options

SECRET = "ENGINESMITH_ADMIN_SECRET"

CALL = """\
    import numpy as np
    import tritonclient.grpc as grpc

    client = grpc.InferenceServerClient({url!r}{tls})
    inputs = [{inputs}]
    for tensor, array in zip(inputs, [{arrays}]):
        tensor.set_data_from_numpy(array)
    result = client.infer({model!r}, inputs, request_id="1", client_timeout=5)
    print({outputs})"""


def serve_options() -> list[click.Parameter]:
    """All options of `serve`."""
    return [*serving_options(), *endpoint_options()]


def serve_bundle(
    bundle: Path, values: Mapping[str, Any], show: Callable[[Any, Callable[[], None]], None], *, quiet: bool
) -> None:
    """Serves until it is told to stop; `show` takes the description when the server answers, and how to print it."""
    signature = Signature.from_json(read_manifest(bundle)["signature"])
    endpoint = endpoint_of(values)
    log = (lambda line: None) if quiet else tell
    if endpoint.exposed and not endpoint.cert:
        log(f"warning: {endpoint.host} can be reached by other machines, and without TLS nothing is encrypted")

    def ready(model: str, server: str, found: Endpoint) -> None:
        described = description(model, server, found, signature)
        show(described, lambda: show_ready(described, signature))
        sys.stdout.flush()

    serve(bundle, serving_of(values), endpoint, watching_of(values), tell=log, ready=ready)


def endpoint_options() -> list[click.Parameter]:
    """Where the server listens, and how it is watched."""
    free = "0 takes a free one."
    return [
        _option("--host", str, "Address to listen on; 0.0.0.0 is all.", default=LOOPBACK),
        _option("--port", _PORT, f"Port of gRPC; {free}", default=8001),
        _option("--http-port", _PORT, f"Port of HTTP; {free} [default: no HTTP]"),
        _option("--metrics-host", str, "Address of the metrics.", default=LOOPBACK),
        _option("--metrics-port", _PORT, f"Port of the metrics; {free}", default=8002),
        _option("--tls-cert", _FILE, "Certificate with its chain, as PEM; switches TLS on."),
        _option("--tls-key", _FILE, "Private key of the certificate, as PEM."),
        _option("--tls-client-ca", _FILE, "Take only clients whose certificate comes from these roots."),
        _option("--probe-s", _SECONDS, "Seconds between two probes with a real inference.", default=5.0),
        _option("--start-s", _SECONDS, "Seconds until a real inference has to answer.", default=300.0),
        _option("--drain-s", _SECONDS, "Seconds to answer what is in flight at the end.", default=30.0),
        _option("--log-requests", click.IntRange(1), "Log one in N requests, with id and times. [default: none]"),
    ]


_PORT = click.IntRange(0, 65535)
_FILE = click.Path(path_type=Path)
_SECONDS = click.FloatRange(0, min_open=True)
_METAVARS = {_FILE: "FILE"}


def _option(name: str, kind: Any, text: str, default: Any = None) -> click.Parameter:
    shown = default is not None
    return click.Option([name], type=kind, default=default, show_default=shown, help=text, metavar=_METAVARS.get(kind))


def endpoint_of(values: Mapping[str, Any]) -> Endpoint:
    """The endpoint that the options describe; the secret comes from the environment, which other users cannot read."""
    names = ("host", "port", "metrics_host", "metrics_port", "http_port")
    files = {name: values[f"tls_{name}"] for name in ("cert", "key", "client_ca")}
    return Endpoint(**{name: values[name] for name in names}, **files, secret=os.environ.get(SECRET, ""))


def watching_of(values: Mapping[str, Any]) -> Watching:
    """How the options want it watched."""
    return Watching(
        interval_s=values["probe_s"],
        start_s=values["start_s"],
        drain_s=values["drain_s"],
        requests=values["log_requests"],
    )


def tell(line: str) -> None:
    """One line of the log, on standard error."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}", file=sys.stderr, flush=True)


def description(model: str, server: str, endpoint: Endpoint, signature: Signature) -> dict[str, Any]:
    """What a client has to know, for JSON."""
    metrics = (
        None if endpoint.metrics_port is None else f"http://{endpoint.metrics_host}:{endpoint.metrics_port}/metrics"
    )
    http = None if endpoint.http_port is None else f"http://{endpoint.host}:{endpoint.http_port}"
    return {
        "model": model,
        "server": server,
        "grpc": endpoint.url,
        "tls": endpoint.cert is not None,
        "http": http,
        "metrics": metrics,
        "pid": os.getpid(),
        "inputs": [str(spec) for spec in signature.inputs],
        "outputs": [str(spec) for spec in signature.outputs],
    }


def show_ready(described: Mapping[str, Any], signature: Signature) -> None:
    """The endpoint, and a call of it that can be copied."""
    click.echo(f"serving {described['model']} with {described['server']}")
    for name in ("grpc", "http", "metrics"):
        if described[name]:
            click.echo(f"  {name:<8} {described[name]}{' (TLS)' if name == 'grpc' and described['tls'] else ''}")
    click.echo("  call it:\n" + _call(described, signature))


def _call(described: Mapping[str, Any], signature: Signature) -> str:
    import numpy as np
    from tritonclient.utils import np_to_triton_dtype

    shapes = signature.shapes(signature.sizes("min"))
    inputs, arrays = [], []
    for spec in signature.inputs:
        shape = list(shapes[spec.name])
        inputs.append(f"grpc.InferInput({spec.name!r}, {shape}, {np_to_triton_dtype(np.dtype(spec.dtype))!r})")
        arrays.append(f"np.zeros({shape}, {spec.dtype!r})")
    return CALL.format(
        url=described["grpc"],
        tls=', ssl=True, root_certificates="root.pem"' if described["tls"] else "",
        model=described["model"],
        inputs=", ".join(inputs),
        arrays=", ".join(arrays),
        outputs=", ".join(f"result.as_numpy({spec.name!r})" for spec in signature.outputs),
    )
