from __future__ import annotations

import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.serving.config import config
from enginesmith.serving.layout import TYPES, Layout, layout
from enginesmith.serving.settings import Serving

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
from google.protobuf import text_format  # noqa: E402

BATCH = {"batch": AxisRange(1, 4, 16), "length": AxisRange(1, 8, 32)}


def signature(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (), axes=BATCH) -> Signature:
    return Signature(inputs, outputs or (TensorSpec("y", "float32", ("batch", 2)),), axes)


X = TensorSpec("x", "float32", ("batch", 3))
NET = signature(X)


def parsed(found: Signature = NET, settings: Serving | None = None, **more):
    given = {"backend": "python", "engine": "e", "kind": "cpu", **more}
    text = config("net", found, settings or Serving(), layout(found), **given)
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_a_model_whose_requests_are_merged():
    found = parsed()
    assert (found.name, found.backend, found.max_batch_size) == ("net", "python", 16)
    assert list(found.input[0].dims) == [3]
    assert found.HasField("dynamic_batching")
    assert not found.dynamic_batching.HasField("default_queue_policy")  # it would make requests stall
    assert found.parameters["enginesmith"].string_value == "e"


def test_a_bounded_queue():
    policy = parsed(settings=Serving(max_queue=8, timeout_ms=1.5)).dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 8
    assert policy.default_timeout_microseconds == 1500
    assert policy.allow_timeout_override
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    batching = parsed(settings=Serving(priorities=3)).dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)


def test_sizes_and_delays():
    found = parsed(settings=Serving(max_batch=8, queue_delay_us=250), preferred=[16, 4, 8])
    assert found.max_batch_size == 8
    assert list(found.dynamic_batching.preferred_batch_size) == [4, 8]
    assert found.dynamic_batching.max_queue_delay_microseconds == 250


def test_requests_that_are_not_merged_may_still_have_several_rows():
    found = parsed(settings=Serving(merge=False))
    assert found.max_batch_size == 16
    assert not found.HasField("dynamic_batching")


def test_instances_on_gpus():
    group = parsed(settings=Serving(instances=2, gpus=(0, 2)), kind="gpu").instance_group[0]
    assert (group.count, list(group.gpus)) == (2, [0, 2])
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU


def test_scalars_get_an_axis_of_size_one():
    found = parsed(signature(X, TensorSpec("t", "float32", ("batch",))))
    assert list(found.input[1].dims) == [1]
    assert found.input[1].HasField("reshape")
    assert list(found.input[1].reshape.shape) == []


def test_axes_of_any_size():
    found = parsed(signature(TensorSpec("ids", "int64", ("batch", "length"))))
    assert list(found.input[0].dims) == [-1]


def test_warm_up_reads_a_file_for_each_input():
    warmup = parsed(warmup={"x": [3]}).model_warmup[0]
    assert warmup.batch_size == 1
    assert warmup.inputs["x"].input_data_file == "input-0.raw"


@pytest.mark.parametrize("dtype", TYPES)
def test_every_dtype_has_its_name(dtype):
    found = parsed(signature(X, outputs=(TensorSpec("y", dtype, ("batch", 2)),)))
    assert model_config_pb2.DataType.Name(found.output[0].data_type) == f"TYPE_{TYPES[dtype]}"


def test_names_are_quoted():
    found = parsed(signature(TensorSpec('a"b\\c', "float32", ("batch", 3))))
    assert found.input[0].name == 'a"b\\c'


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (signature(TensorSpec("x", "float32", (1, 3)), axes={}), "no input has a dynamic first axis"),
        (signature(X, TensorSpec("k", "float32", (3,))), "input 'k' does not begin with the axis 'batch'"),
        (signature(X, outputs=(TensorSpec("y", "float32", ("?", 2)),)), "output 'y' does not begin with the axis"),
        (signature(TensorSpec("x", "float32", ("batch", "batch"))), "input 'x' has the axis 'batch' twice"),
        (signature(X, axes={"batch": AxisRange(2, 4, 8)}), "the engine takes no batch below 2"),
    ],
)
def test_models_that_cannot_be_merged_say_why(found, reason):
    assert layout(found).max_batch == 0
    assert reason in layout(found).reason
    assert parsed(found).max_batch_size == 0
    assert not parsed(found).HasField("dynamic_batching")


def test_a_model_that_can_be_merged():
    assert layout(NET) == Layout(16)
