import shutil
import zipfile

import numpy as np
import pytest
import torch

from enginesmith.compiler.signature import AxisRange, parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import RecipeError, SourceError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, state, flag=True):
        if not flag:
            self.count += 1
        return {"y": self.linear(x) + self.count, "state": [state[0] + state[1], None]}


def save(path, flag):
    batch = torch.export.Dim("n", min=1, max=8)
    arguments = (torch.ones(2, 4), (torch.ones(2, 3), torch.ones(3)), flag)
    shapes = {"x": {0: batch}, "state": ({0: batch}, None), "flag": None}
    torch.export.save(torch.export.export(Net().eval(), arguments, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pt2")
    return {flag: save(folder / f"{flag}.pt2", flag) for flag in (True, False)}


INPUTS = parse_inputs(["x:1x4"], ["x:0=1..4..8"])
ARRAYS = {"x": np.ones((5, 4), "f"), "state_0": np.ones((5, 3), "f"), "state_1": np.ones(3, "f")}


def test_the_signature_is_the_programs(programs):
    model = load_model(programs[True], inputs=INPUTS)
    assert model.kind == "exported-program"
    assert [str(spec) for spec in model.signature.inputs] == [
        "x:batchx4:float32", "state_0:batchx3:float32", "state_1:3:float32",
    ]  # fmt: skip
    assert [spec.name for spec in model.signature.outputs] == ["y", "state.0"]
    assert model.signature.axes == {"batch": AxisRange(1, 4, 8)}
    assert model.signature.nest(model.reference.run(ARRAYS))["state"][0].tolist() == [[2.0] * 3] * 5
    assert model.signature.nest(model.reference.run(ARRAYS))["state"][1] is None
    assert model.parameter_bytes == 4 * (12 + 3 + 1)
    assert not model.stateful


def test_state_is_found_and_reset(programs):
    model = load_model(programs[False], inputs=INPUTS)
    first, second = model.reference.run(ARRAYS)["y"], model.reference.run(ARRAYS)["y"]
    assert model.stateful
    np.testing.assert_allclose(second, first + 1, rtol=1e-6)
    model.reference.reset()
    np.testing.assert_array_equal(model.reference.run(ARRAYS)["y"], first)


@pytest.mark.parametrize(
    ("inputs", "arguments", "error", "match"),
    [
        (None, {}, RecipeError, "axis 0 .* of input 'x' is dynamic in True.pt2, and has no range"),
        (parse_inputs(["x:1x4"], ["x:0=1..4..64"]), {}, RecipeError, r"beyond what .* exported for(?s:.*)1\.\.8"),
        (parse_inputs(["x:9x4"]), {}, RecipeError, r"beyond what .* exported for(?s:.*)9\.\.9"),
        (parse_inputs(["y:1x4"]), {}, UnknownNameError, "unknown input of True.pt2 'y'"),
        (INPUTS, {"width": 3}, RecipeError, "True.pt2 takes no arguments"),
    ],
)
def test_inputs_that_do_not_fit(programs, inputs, arguments, error, match):
    with pytest.raises(error, match=match):
        load_model(programs[True], inputs=inputs, arguments=arguments)


def rewritten(source, path, change):
    """A copy of the archive whose members went through `change(name, content)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            for member, content in change(name, old.read(name)):
                new.writestr(member, content)
    return path


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


def test_pickled_code_is_refused_and_not_run(programs, tmp_path):
    sentinel = tmp_path / "ran"
    torch.save(Evil(sentinel), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()

    def change(name, content):
        return [(name, evil if "sample_inputs" in name else content)]

    with pytest.raises(SourceError, match=r"exported program .* cannot be loaded"):
        load_model(rewritten(programs[True], tmp_path / "a.pt2", change), inputs=INPUTS)
    assert not sentinel.exists()


def test_pickled_objects_are_refused(programs, tmp_path):
    def change(name, content):
        added = [("True/data/constants/opaque_obj_0", b"")] if name.endswith("byteorder") else []
        return [(name, content), *added]

    with pytest.raises(SourceError, match=r"holds pickled objects, which are never loaded(?s:.*)opaque_obj_0"):
        load_model(rewritten(programs[True], tmp_path / "b.pt2", change), inputs=INPUTS)


def test_a_damaged_program_is_refused(programs, tmp_path):
    damaged = rewritten(
        programs[True], tmp_path / "c.pt2", lambda name, c: [(name, c[: len(c) // 2] if "models/" in name else c)]
    )
    with pytest.raises(SourceError, match=r"exported program .* cannot be loaded"):
        load_model(damaged, inputs=INPUTS)


def test_a_truncated_program_is_refused(programs, tmp_path):
    shutil.copy(programs[True], tmp_path / "d.pt2")
    (tmp_path / "d.pt2").write_bytes(programs[True].read_bytes()[:2000])
    with pytest.raises(SourceError, match="truncated or damaged archive"):
        load_model(tmp_path / "d.pt2", inputs=INPUTS)


def test_inputs_that_are_no_tensors_are_refused(tmp_path):
    class Times(torch.nn.Module):
        def forward(self, x, n):
            return x * n

    shapes = {"x": None, "n": torch.export.Dim.DYNAMIC}
    torch.export.save(torch.export.export(Times(), (torch.ones(2), 3), dynamic_shapes=shapes), tmp_path / "n.pt2")
    with pytest.raises(SourceError, match=r"input 'n' of the exported program is no tensor(?s:.*)as a constant"):
        load_model(tmp_path / "n.pt2")


def test_ranges_without_inputs(programs):
    assert load_model(programs[True], dynamic=["x:0=1..4..8"]).signature.axes == {"batch": AxisRange(1, 4, 8)}
