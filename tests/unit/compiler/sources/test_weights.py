import pickle

import pytest
import safetensors.torch
import torch

from enginesmith.compiler.sources.weights import check_values, load_weights, read_weights, tensor_digest
from enginesmith.errors import SourceError


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


def linear():
    torch.manual_seed(7)
    return torch.nn.Linear(2, 3)


def save(path, value):
    torch.save(value, path)
    return path


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_a_state_dict_is_found_in_a_checkpoint(tmp_path, wrap, prefix):
    state = {prefix + key: value + 1 for key, value in linear().state_dict().items()}
    module = linear()
    path = save(tmp_path / "w.pt", wrap(state))
    load_weights(module, read_weights(path), path)
    assert torch.equal(module.weight, linear().weight + 1)


def test_older_files_and_safetensors_are_read(tmp_path):
    state = linear().state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    for name in ("old.pth", "w.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["weight"], state["weight"])


def test_half_precision_weights_take_the_dtype_of_the_module(tmp_path):
    module = linear()
    path = save(tmp_path / "w.pt", {key: value.half() for key, value in module.state_dict().items()})
    load_weights(module, read_weights(path), path)
    assert module.weight.dtype is torch.float32


def test_one_name_of_a_shared_tensor_is_enough(tmp_path):
    def tied():
        module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        module[1].weight = module[0].weight
        return module

    state = {key: value + 1 for key, value in tied().state_dict().items() if key != "1.weight"}
    module = tied()
    load_weights(module, state, tmp_path / "w.pt")
    assert torch.equal(module[1].weight, state["0.weight"])


def test_a_module_without_values_is_filled(tmp_path):
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
    load_weights(module, linear().state_dict(), tmp_path / "w.pt")
    assert torch.equal(module.weight, linear().weight)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    sentinel = tmp_path / "ran"
    torch.save({"weight": Evil(sentinel)}, tmp_path / "new.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"weight": Evil(sentinel)}))
    torch.save(linear(), tmp_path / "module.pt")
    for name in ("new.pt", "raw.pt", "module.pt"):
        with pytest.raises(SourceError, match=r"hold pickled code, which is never run(?s:.*)state_dict"):
            read_weights(tmp_path / name)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["w.pt", "old.pt", "w.safetensors"])
def test_truncated_files_are_refused(tmp_path, name):
    path = tmp_path / name
    state = torch.nn.Linear(50, 50).state_dict()
    if name == "w.safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "w.pt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"cannot be read(?s:.*)truncated"):
        read_weights(path)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([1, 2], "hold no state_dict(?s:.*)found: list"),
        ({"epoch": 3, "lr": 0.1}, "hold no state_dict(?s:.*)found: keys epoch, lr"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, value, match):
    with pytest.raises(SourceError, match=match):
        read_weights(save(tmp_path / "w.pt", value))


def test_missing_file_and_empty_file(tmp_path):
    with pytest.raises(SourceError, match="are no file"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(SourceError, match="cannot be read"):
        read_weights(tmp_path / "empty.pt")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("bias"), "do not fit the module(?s:.*)expected: 2 tensors(?s:.*)1 missing: bias"),
        (lambda s: s.update(a=1, b=2, c=3, d=4), r"4 unexpected: a, b, c, \.\.\."),
        (lambda s: s.update(bias=torch.zeros(4)), r"1 of another shape: bias is \(4,\), expected \(3,\)"),
        (lambda s: s.update(bias="text"), "1 no tensor: bias"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, match):
    state = dict(linear().state_dict())
    change(state)
    with pytest.raises(SourceError, match=match):
        load_weights(linear(), state, tmp_path / "w.pt")


def test_values_that_are_not_finite_are_refused():
    weight = torch.ones(2, 2)
    names = frozenset({"w"})
    check_values({"w": weight, "mask": torch.tensor([0.0, -torch.inf]), "n": torch.tensor(1)}, parameters=names)
    weight[0, 1] = torch.nan
    with pytest.raises(SourceError, match=r"weight 'w' holds NaN(?s:.*)1 of 4 values"):
        check_values({"w": weight}, parameters=names)
    with pytest.raises(SourceError, match="weight 'mask' holds NaN"):
        check_values({"mask": torch.tensor([torch.nan])}, parameters=names)
    for infinity in (torch.inf, -torch.inf):
        with pytest.raises(SourceError, match="weight 'w' holds infinity"):
            check_values({"w": torch.tensor([1.0, infinity])}, parameters=names)
    with pytest.raises(SourceError, match=r"weight 'w' has no values"):
        check_values({"w": torch.empty(2, device="meta")}, parameters=names)
    with pytest.raises(SourceError, match="weight 'w' has no values"):
        check_values({"w": torch.nn.LazyLinear(2).weight}, parameters=names)


def test_digest_tells_names_dtypes_shapes_and_values_apart():
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0))},
    ]
    assert len({tensor_digest(tensors) for tensors in (base, *others)}) == 5
    assert tensor_digest({"a": torch.zeros(3, 2).T}) == tensor_digest(base)
    assert tensor_digest({"a": torch.zeros((), dtype=torch.bfloat16), "e": torch.zeros(0)})
