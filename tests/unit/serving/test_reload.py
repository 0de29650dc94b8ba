"""A bundle in the place of another, with a server that does what it is told; test_serve_reload.py has a real one."""

from __future__ import annotations

import runpy
import shutil
import time
from pathlib import Path

import psutil
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import EngineError, UsageError
from enginesmith.serving import reload as module
from enginesmith.serving.endpoint import Endpoint
from enginesmith.serving.launch import Watching
from enginesmith.serving.probe import ProbeError
from enginesmith.serving.reload import Reloader, changed
from enginesmith.serving.repository import export
from enginesmith.serving.settings import Serving
from enginesmith.serving.watch import TroubleError

small = runpy.run_path(str(Path(__file__).parents[2] / "small_bundles.py"))
write_bundle, signature = small["write_bundle"], small["signature"]


class FakeServer:
    """Notes what is asked of it; `failures` are what the next calls by a name fail with."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, Exception] = {}

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.failures:
            raise self.failures.pop(call)


class FakeProbe:
    def __init__(self, server: FakeServer, model: str, engine: str | None) -> None:
        self.server, self.model, self.engine = server, model, engine

    def __call__(self, timeout_s: float) -> None:
        self.server.note(f"ask {self.model} {self.engine}")

    def load(self, timeout_s: float) -> None:
        self.server.note(f"load {self.model} {self.engine}")

    def unload(self, timeout_s: float) -> None:
        self.server.note(f"unload {self.model}")

    def close(self) -> None:
        self.server.note("close")


class FakeWatch:
    """Waits for nothing."""

    def __init__(self) -> None:
        self.server = self

    def result(self, work, meanwhile=None):
        return work()

    def children(self) -> list[object]:
        return []

    def replace_models(self) -> None:
        """No process runs."""

    watch_models = replace_models


@pytest.fixture
def server(monkeypatch):
    found = FakeServer()
    monkeypatch.setattr(module, "Probe", lambda bundle, model, endpoint, engine: FakeProbe(found, model, engine))
    return found


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "net", {"old": ""})


@pytest.fixture
def reload(bundle, tmp_path, server):
    """Serves the bundle; the call reloads it."""
    served = export(bundle, tmp_path / "models", Serving(), link=True)
    reloader = Reloader(bundle, served, Serving(), Endpoint(), Watching())
    return lambda: (reloader.replaced(FakeWatch(), FakeProbe(server, "net", "old")), str(reloader))


def replace(bundle: Path, **options) -> None:
    shutil.rmtree(bundle)
    write_bundle(bundle, {"new": ""}, **options)


def on_disk(tmp_path: Path) -> tuple[list[str], str, list[str]]:
    """Models, the first line of the configuration, and the engines that are served."""
    models = tmp_path / "models"
    first = (models / "net/config.pbtxt").read_text().splitlines()[0]
    engines = [path.name for path in (models / "net/1/bundle/engines").iterdir()]
    return [path.name for path in models.iterdir()], first, engines


NEW = (["net"], 'name: "net"', ["new"])
OLD = (["net"], 'name: "net"', ["old"])


def test_the_new_one_answers_under_another_name_before_it_takes_the_place(reload, bundle, tmp_path, server):
    replace(bundle, w=2 * small["W"])
    probe, told = reload()
    trial = ["load net.next1 new", "ask net.next1 new", "unload net.next1"]
    assert server.calls == [*trial, "load net new", "ask net new", "close"]
    assert (probe.model, told) == ("net", f"engine new of {bundle}")
    assert on_disk(tmp_path) == NEW


def test_a_link_that_was_moved_is_followed_and_the_name_stays(tmp_path, server):
    one, other = write_bundle(tmp_path / "v1", {"old": ""}), write_bundle(tmp_path / "v2", {"new": ""})
    link = tmp_path / "net"
    link.symlink_to(one)
    served = export(link, tmp_path / "models", Serving(name="net"), link=True)
    link.unlink()
    link.symlink_to(other)
    Reloader(link, served, Serving(), Endpoint(), Watching()).replaced(FakeWatch(), FakeProbe(server, "net", "old"))
    assert on_disk(tmp_path) == NEW


def test_it_can_be_reloaded_again_and_again(reload, bundle, tmp_path, server):
    for _ in range(3):
        replace(bundle)
        reload()
    assert server.calls.count("load net new") == 3
    assert on_disk(tmp_path) == NEW


@pytest.mark.parametrize("call", ["load net.next1 new", "ask net.next1 new"])
def test_one_that_does_not_load_or_answers_wrongly_never_takes_the_place(reload, bundle, tmp_path, server, call):
    replace(bundle)
    server.failures[call] = ProbeError("output 'left' is 0.7 from the reference", wrong=True)
    with pytest.raises(ProbeError, match=r"output 'left' is 0\.7 from the reference"):
        reload()
    assert server.calls[-2:] == ["unload net.next1", "close"]
    assert on_disk(tmp_path) == OLD


@pytest.mark.parametrize("call", ["load net new", "ask net new"])
def test_where_it_fails_in_the_place_the_old_one_is_loaded_again(reload, bundle, tmp_path, server, call):
    replace(bundle)
    server.failures[call] = ProbeError("INTERNAL: no memory")
    with pytest.raises(ProbeError, match="INTERNAL: no memory"):
        reload()
    assert server.calls[-3:] == ["load net old", "ask net old", "close"]
    assert on_disk(tmp_path) == OLD


def test_where_the_old_one_cannot_be_loaded_again_either_the_server_is_in_trouble(reload, bundle, tmp_path, server):
    replace(bundle)
    server.failures = {"ask net new": ProbeError("INTERNAL: dead"), "load net old": ProbeError("no memory")}
    with pytest.raises(TroubleError, match="what was served before could not be loaded again: no memory"):
        reload()
    assert on_disk(tmp_path) == OLD


def test_a_server_that_dies_meanwhile_starts_again_with_the_old_one(reload, bundle, tmp_path, server):
    replace(bundle)
    server.failures["load net new"] = TroubleError("the server (process 1) ended with signal SIGKILL", alive=False)
    with pytest.raises(TroubleError, match="ended with signal SIGKILL"):
        reload()
    assert on_disk(tmp_path) == OLD


def test_a_full_queue_is_no_reason_to_take_it_back(reload, bundle, tmp_path, server):
    replace(bundle)
    server.failures["ask net new"] = ProbeError("UNAVAILABLE: Exceeds maximum queue size", busy=True)
    reload()
    assert on_disk(tmp_path) == NEW


def test_a_bundle_that_cannot_be_served_is_not_even_loaded(reload, bundle, tmp_path, server):
    shutil.rmtree(bundle)
    with pytest.raises(UsageError, match="is not a bundle"):
        reload()
    assert server.calls == []
    assert on_disk(tmp_path) == OLD


def test_a_bundle_of_another_signature_is_not_even_loaded(reload, bundle, tmp_path, server):
    replace(bundle, described=signature(1, 2, 4))
    message = (
        r"clients of the old model would fail: input 'x' was float32 \(batch=1..4..8, 4\), and is float32 \(batch=1"
    )
    with pytest.raises(EngineError, match=message):
        reload()
    assert server.calls == []
    assert on_disk(tmp_path) == OLD


def described(x="float32", rank=(4,), axes=(1, 4, 8), outputs=("left",), out=("batch", 3), first="batch") -> Signature:
    return Signature(
        (TensorSpec("x", x, (first, *rank)),),
        tuple(TensorSpec(name, "float32", out) for name in outputs),
        {"batch": AxisRange(*axes)},
    )


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        (described(), ""),
        (described(axes=(1, 8, 64)), ""),
        (described(outputs=("left", "right")), ""),
        (described(axes=(2, 4, 8)), "input 'x' was float32 (batch=1..4..8, 4), and is float32 (batch=2..4..8, 4)"),
        (described(first=8), "input 'x' was float32 (batch=1..4..8, 4), and is float32 (8, 4)"),
        (described(x="float16"), "input 'x' was float32 (batch=1..4..8, 4), and is float16 (batch=1..4..8, 4)"),
        (described(rank=(2, 2)), "and is float32 (batch=1..4..8, 2, 2)"),
        (described(outputs=("right",)), "it has no output 'left'"),
        (
            described(out=("batch", 5)),
            "output 'left' was float32 (batch=1..4..8, 3), and is float32 (batch=1..4..8, 5)",
        ),
        (described(out=("?", 3)), "requests were merged before, and now the opposite holds"),
        (Signature((TensorSpec("z", "float32", (4,)),)), "it takes another input, 'z:4:float32'"),
    ],
)
def test_what_clients_would_trip_over(new, problem):
    found = changed(described(), new)
    assert found == problem if not problem else problem in found


def test_an_input_that_is_gone():
    old = Signature((TensorSpec("x", "float32", (4,)), TensorSpec("mask", "bool", (4,))))
    assert changed(old, Signature(old.inputs[:1])) == "it has no input 'mask'"


def decoder(room: int = 16, tokens: int = 11, heads: int = 2) -> Signature:
    cache = ("batch", heads, room, 8)
    return Signature(
        (TensorSpec("ids", "int64", ("batch", "time")), TensorSpec("key", "float32", cache)),
        (TensorSpec("logits", "float32", ("batch", tokens)), TensorSpec("key_out", "float32", cache)),
        {"batch": AxisRange(1, 4, 8), "time": AxisRange(1, 1, 16)},
        states={"key": "key_out"},
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (decoder(), decoder(room=32, heads=4), ""),
        (decoder(), decoder(room=8), "it had room for 16 tokens, and has room for 8"),
        (decoder(), decoder(tokens=12), "it knew 11 tokens, and knows 12"),
        (decoder(), described(), "the old one was a language model, and the new one is the opposite"),
        (described(), decoder(), "the old one was no language model, and the new one is the opposite"),
    ],
)
def test_clients_of_a_language_model_care_for_its_tokens_alone(old, new, problem):
    assert changed(old, new) == problem


class Loads:
    """A server whose processes are told; it has one from the beginning."""

    def __init__(self) -> None:
        self.processes = [_sleep()]
        self.server = self

    def children(self) -> list[psutil.Process]:
        return [*self.processes]


def _sleep() -> psutil.Process:
    return psutil.Popen(["sleep", "60"])


def test_a_process_that_dies_while_it_loads_is_given_up_where_the_server_does_not_see_it(monkeypatch):
    server = Loads()
    look = module._Loading(server, "net", ProbeError)
    look()
    server.processes.append(_sleep())
    server.processes[1].kill()
    while server.processes[1].status() != "zombie":
        time.sleep(0.01)
    look()  # the server has some time to see it
    monkeypatch.setattr(module, "NOTICED_S", 0.0)
    message = rf"process {server.processes[1].pid}, which was to load model 'net', died"
    with pytest.raises(ProbeError, match=message):
        look()
    for process in server.processes:
        process.kill()
        process.wait()
