"""The files of samples/serving say the same as each other and as what the exporter writes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import yaml

import enginesmith
from enginesmith.serving.repository import export
from enginesmith.serving.settings import Serving

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "samples" / "serving"
small = runpy.run_path(str(ROOT / "tests" / "small_bundles.py"))
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


def documents(name: str) -> list:
    return list(yaml.safe_load_all((SAMPLES / name).read_text()))


def test_the_image_is_pinned_and_has_the_fixes_of_august_2025():
    first = next(line for line in (SAMPLES / "Dockerfile").read_text().splitlines() if line.startswith("FROM"))
    year, month = first.rpartition(":")[2].partition("-")[0].split(".")
    assert (int(year), int(month)) >= (25, 7)


def test_compose_serves_the_repository_on_this_machine_only():
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    triton = services["triton"]
    assert [port.split(":") for port in triton["ports"]] == [["127.0.0.1", str(p), str(p)] for p in PORTS.values()]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    mounted = triton["volumes"][0].rsplit(":", 2)[1]
    assert f"--model-repository={mounted}" in triton["command"]
    assert (SAMPLES / triton["build"]["context"] / triton["build"]["dockerfile"]).is_file()
    assert f"triton:{PORTS['metrics']}" in compose["configs"]["prometheus"]["content"]
    assert all(":" in image and not image.endswith(":latest") for image in (s["image"] for s in services.values()))


def test_all_name_the_image_that_the_dockerfile_builds():
    built = f"enginesmith-triton:{enginesmith.__version__}-25.07"
    (compose,) = documents("compose.yaml")
    deployment, _ = documents("kubernetes.yaml")
    (service,) = documents("kserve.yaml")
    assert compose["services"]["triton"]["image"] == built
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == built
    assert f"image: {built}" in (SAMPLES / "kserve.yaml").read_text()
    assert service["kind"] == "InferenceService"
    dockerfile = (SAMPLES / "Dockerfile").read_text()
    assert f"-t {built} ." in dockerfile
    assert "tritonserver:25.07-py3" in dockerfile
    assert "onnxruntime==" in dockerfile


def test_the_deployment_and_its_service_agree():
    deployment, service = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == PORTS
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]}.items() <= PORTS.items()
    models = next(mount for mount in container["volumeMounts"] if mount["name"] == "models")
    assert f"--model-repository={models['mountPath']}" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in PORTS
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(PORTS["metrics"])
    drain = next(argument for argument in container["args"] if argument.startswith("--exit-timeout-secs="))
    assert pod["spec"]["terminationGracePeriodSeconds"] > int(drain.partition("=")[2])


def test_kserve_serves_the_same_by_grpc():
    (service,) = documents("kserve.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"]["name"] == "triton"
    assert model["ports"][0]["containerPort"] == PORTS["grpc"]
    assert model["image"] == documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]["image"]


def test_what_the_exporter_writes_is_what_these_serve(tmp_path):
    """A folder for the model in the repository, its configuration complete, and nothing of this machine in it."""
    bundle = small["write_bundle"](tmp_path / "digits")
    export(bundle, tmp_path / "models", Serving())
    assert documents("kubernetes.yaml")[0]["metadata"]["name"] == "digits"
    wanted = json.loads((tmp_path / "models" / "digits" / "1" / "serve.json").read_text())
    assert (wanted["bundle"], wanted["path"]) == ("bundle", [])
    for file in (tmp_path / "models").rglob("*.pbtxt"):
        assert str(tmp_path) not in file.read_text()
