"""How packages are opened and called, with what stands for torch's runtime."""

from __future__ import annotations

import re

import pytest
import torch

from enginesmith.targets.inductor.package import Package


class Loader:
    """Adds its inputs to a weight."""

    def __init__(self, *given):
        self.given = given
        self.weights = {}

    def boxed_run(self, inputs):
        found = [tensor + self.weights["w"] for tensor in inputs]
        inputs.clear()  # as torch's does, which takes them over
        return found

    def get_constant_fqns(self):
        return ["w"]

    def load_constants(self, weights, use_inactive, check_full_update, user_managed):
        assert (use_inactive, check_full_update, user_managed) == (False, True, True)
        self.weights = weights


def test_calls_go_to_torchs_runtime(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    package = Package(tmp_path / "one.pt2", single_threaded=True, device_index=1)
    assert package._loader.given == (str(tmp_path / "one.pt2"), "model", True, 1, 1)
    assert package.constants() == ["w"]
    package.refer_to({"w": torch.ones(2)})
    first, second = torch.zeros(2), torch.ones(2)
    assert [tensor.tolist() for tensor in package(first, second)] == [[1, 1], [2, 2]]


def test_a_file_that_is_no_package_is_refused(tmp_path):
    file = tmp_path / "one.pt2"
    file.write_bytes(b"no package")
    with pytest.raises(RuntimeError, match=re.escape("Failed to initialize zip archive")):
        Package(file)
