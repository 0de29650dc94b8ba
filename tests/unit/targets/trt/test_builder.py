import types

import pytest

from enginesmith.targets.trt.builder import (
    _load_timing_cache,
    _save_timing_cache,
    _weak_typing,
    rules,
    write_atomically,
)
from enginesmith.targets.trt.callbacks import listen, make_progress_monitor


def member(name):
    return types.SimpleNamespace(name=name)


FLOAT, HALF = member("FLOAT"), member("HALF")
TRT = types.SimpleNamespace(
    IProgressMonitor=object,
    DataType=types.SimpleNamespace(FLOAT=FLOAT),
    LayerInformationFormat=types.SimpleNamespace(JSON="json"),
)


class Layer:
    """A layer of a network, with a type and the types that the model gives its outputs.

    The network itself calls them all float, as a weakly typed one does before it is built.
    """

    def __init__(self, kind, *outputs):
        self.name, self.type, self.outputs, self.precision, self.output_types = kind, member(kind), outputs, None, {}
        self.num_outputs = len(outputs)

        self.num_inputs, self.inputs = 0, ()

    def reading(self, *layers):
        self.num_inputs, self.inputs = len(layers), [layer.get_output(0) for layer in layers]
        return self

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return types.SimpleNamespace(name=f"{self.name}.{index}", dtype=FLOAT)

    def set_output_type(self, index, dtype):
        self.output_types[index] = dtype


def network(*layers):
    return types.SimpleNamespace(num_layers=len(layers), get_layer=lambda index: layers[index])


def weak_typing(*layers):
    model = {f"{layer.name}.{i}": dtype.name for layer in layers for i, dtype in enumerate(layer.outputs)}
    return _weak_typing(TRT, network(*layers), model)


@pytest.mark.parametrize(
    ("module", "version", "strongly_typed"),
    [
        ("tensorrt", "8.6.0", False),
        ("tensorrt", "9.3.0.1", False),
        ("tensorrt", "10.0.1", True),
        ("tensorrt", "11.4.0", True),
        ("tensorrt_rtx", "1.7.1.116", True),
    ],
)
def test_networks_are_strongly_typed_from_version_10_on(module, version, strongly_typed):
    found = rules(module, version)
    assert found.strongly_typed is strongly_typed
    assert (found.tactic_sources is None) is strongly_typed


def test_an_fp32_network_needs_no_flag():
    layers = [Layer("CONVOLUTION", FLOAT), Layer("SOFTMAX", FLOAT)]
    assert weak_typing(*layers) == {"fp16": False, "int8": False}
    assert layers[0].precision is None


def test_what_the_graph_keeps_in_fp32_is_pinned_where_fp16_is_allowed(capsys):
    convolution, softmax, cast = Layer("CONVOLUTION", HALF), Layer("SOFTMAX", FLOAT), Layer("CAST", FLOAT)
    flags = weak_typing(convolution, softmax, cast)
    assert flags == {"fp16": True, "int8": False, "precision_constraints": "prefer"}
    assert "1 layers are pinned to fp32: SOFTMAX" in capsys.readouterr().err
    assert softmax.precision is FLOAT
    assert softmax.output_types == {0: FLOAT}
    assert convolution.precision is None
    assert cast.precision is None


def test_a_network_of_fp16_arithmetic_alone_needs_no_pins():
    flags = weak_typing(Layer("CAST", HALF), Layer("CONVOLUTION", HALF), Layer("CAST", FLOAT))
    assert flags == {"fp16": True, "int8": False}


@pytest.mark.parametrize(("kind", "pinned"), [("HALF", False), ("FLOAT", True)])
def test_parts_of_a_node_have_the_type_of_the_whole(kind, pinned):
    product = Layer("MATRIX_MULTIPLY", FLOAT)
    weighted = Layer("SCALE", FLOAT).reading(product)
    whole = Layer("ELEMENTWISE", FLOAT).reading(weighted)
    softmax = Layer("SOFTMAX", FLOAT).reading(whole)
    model = {"CAST.0": "HALF", "ELEMENTWISE.0": kind, "SOFTMAX.0": "FLOAT"}
    _weak_typing(TRT, network(Layer("CAST", HALF), product, weighted, whole, softmax), model)
    assert [layer.precision is FLOAT for layer in (product, weighted, whole, softmax)] == [pinned] * 3 + [True]


def test_layers_that_read_quantized_values_are_not_pinned():
    dequantize = Layer("DEQUANTIZE", HALF)
    convolution, softmax = Layer("CONVOLUTION", FLOAT).reading(dequantize), Layer("SOFTMAX", FLOAT)
    flags = weak_typing(Layer("QUANTIZE", FLOAT), dequantize, convolution, softmax)
    assert flags == {"fp16": True, "int8": True, "precision_constraints": "prefer"}
    assert convolution.precision is None
    assert softmax.precision is FLOAT


def test_layers_without_a_type_in_a_quantized_model_are_not_pinned():
    part = Layer("ELEMENTWISE", FLOAT)
    layers = network(Layer("QUANTIZE", HALF), part)
    assert _weak_typing(TRT, layers, {"QUANTIZE.0": "HALF"}) == {"fp16": True, "int8": True}


def test_what_tensorrt_logs_of_layers_is_kept():
    passed = []
    logger = types.SimpleNamespace(log=lambda severity, message: passed.append((severity, message)))
    told = listen(logger)
    messages = ("Layers:\nold", "Layers are many", "(Sparsity) one", "Layers:\nName: a", "(Sparsity) two")
    for message in messages:
        logger.log("verbose", message)
    assert told.layers == ["Layers:\nName: a"]
    assert told.sparsity == ["(Sparsity) one", "(Sparsity) two"]
    assert len(passed) == len(messages)


def test_nested_phases_become_one_growing_fraction():
    reports = []
    monitor = make_progress_monitor(TRT, lambda *report: reports.append(report))
    monitor.phase_start("Building engine", None, 2)
    monitor.phase_start("Optimizing graph", "Building engine", 4)
    assert monitor.step_complete("Optimizing graph", 1)
    monitor.phase_finish("Optimizing graph")
    monitor.step_complete("Building engine", 0)
    monitor.phase_start("Timing tactics", "Building engine", 1000)
    for step in range(1000):
        monitor.step_complete("Timing tactics", step)
    monitor.step_complete("Timing tactics", 5)  # never goes back
    assert reports[:2] == [(0.258, "Optimizing graph"), (0.495, "Building engine")]
    assert [fraction for fraction, _ in reports] == sorted(fraction for fraction, _ in reports)
    assert len(reports) < 60
    assert reports[-1][0] <= 0.97


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "tactics.timing"
    for content in (b"old", b"new"):
        write_atomically(str(path), content)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


class Cache:
    """A timing cache that holds the letters of its file."""

    def __init__(self, content):
        self.content = content

    def combine(self, other, *, ignore_mismatch):
        assert not ignore_mismatch
        self.content = bytes(sorted(set(self.content + other.content)))

    def serialize(self):
        return self.content


class Config:
    """A builder configuration that refuses caches with an x."""

    def __init__(self, measured=b""):
        self.cache = Cache(measured)

    def create_timing_cache(self, content):
        return Cache(content)

    def set_timing_cache(self, cache, *, ignore_mismatch):
        if b"x" in cache.content:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


def test_a_timing_cache_grows_with_what_others_measured(tmp_path):
    path = str(tmp_path / "tactics.timing")
    assert _load_timing_cache(Config(), path) is None
    for measured in (b"b", b"a", b"c"):
        _save_timing_cache(Config(measured), path)
    config = Config()
    assert _load_timing_cache(config, path) is config.cache
    assert config.cache.content == b"abc"


def test_a_timing_cache_of_another_gpu_is_left_alone(tmp_path, capsys):
    path = tmp_path / "tactics.timing"
    path.write_bytes(b"x")
    config = Config()
    _load_timing_cache(config, str(path))
    assert config.cache.content == b""
    assert "does not fit this GPU and version" in capsys.readouterr().err
