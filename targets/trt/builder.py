"""Builds TensorRT engines from ONNX files, through Polygraphy. Runs in the worker process.

Needs Polygraphy and TensorRT or TensorRT-RTX,.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .callbacks import listen, make_progress_monitor
from .driver import Failure, gpu
from .layers import engine_layers, graph_layers, logged_layers, summarize
from .session import write_atomically
from .sparsity import sparse_layers


class Rules(NamedTuple):
    """What differs between versions.

                       8.6, 9               10, 11, RTX
    precision          builder flags too    the graph alone (strongly typed)
    tactic sources     its own kernels      all that it knows
    preview features   profile sharing      none needed

    TensorRT before 10 may take kernels from cuBLAS and cuDNN, whose versions must then match; its own are as fast. And
    it lets two execution contexts use one optimization profile only where profile sharing was on at the build.
    """

    strongly_typed: bool
    tactic_sources: tuple[str, ...] | None
    preview_features: tuple[str, ...]


def rules(module: str, version: str) -> Rules:
    """The rules of a version of ``tensorrt`` or ``tensorrt_rtx``."""
    if module == "tensorrt_rtx" or int(version.split(".")[0]) >= 10:
        return Rules(strongly_typed=True, tactic_sources=None, preview_features=())
    own = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
    return Rules(strongly_typed=False, tactic_sources=own, preview_features=("PROFILE_SHARING_0806",))


def build(
    module: str,
    onnx: str,
    plan: str,
    layers: str,
    profiles: list[dict[str, list[list[int]]]],
    types: dict[str, str],
    options: dict[str, Any],
    timing_cache: str | None,
    report: Callable[[float, str], None],
) -> dict[str, Any]:
    """Builds the plan of an ONNX file and writes it, with its layers.

    Args:
        module: "tensorrt" or "tensorrt_rtx".
        onnx: model to read.
        plan: file to write the engine to.
        layers: file to write the layers to, as JSON.
        profiles: ranges to tune for, each from the name of an input to its least, usual and largest shape.
        types: data type ("FLOAT", "HALF") that the model's tensors are to have, by name. A weakly typed network does
            not know them before it is built.
        options: those of the target; read are "workspace_gib", "builder_level", "tf32", "sparsity", "aux_streams" and
            "compute_capabilities".
        timing_cache: file of measured tactics, read and added to; None for none.
        report: takes the fraction done and the phase.
    """
    trt = importlib.import_module(module)
    from polygraphy.backend.trt import Profile, get_trt_logger, network_from_onnx_path
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.VERBOSE
    version_rules = rules(module, trt.__version__)
    report(0.0, "reading the graph")
    told = listen(get_trt_logger())
    try:
        builder, network, _parser = network_from_onnx_path(onnx, strongly_typed=version_rules.strongly_typed)
        for tensor in (network.get_input(index) for index in range(network.num_inputs)):
            if tensor.is_shape_tensor:
                raise Failure("failed", f"input {tensor.name!r} decides shapes by its values; make it a constant")
        arguments: dict[str, Any] = {
            "profiles": [_profile(Profile(), shapes) for shapes in profiles],
            "builder_optimization_level": options.get("builder_level"),
            "sparse_weights": options.get("sparsity"),
            "max_aux_streams": options.get("aux_streams"),
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        }
        if options.get("workspace_gib") is not None:
            pool = {trt.MemoryPoolType.WORKSPACE: int(options["workspace_gib"] * (1 << 30))}
            arguments["memory_pool_limits"] = pool
        if version_rules.tactic_sources is not None:
            arguments["tactic_sources"] = [getattr(trt.TacticSource, name) for name in version_rules.tactic_sources]
        if hasattr(trt, "IProgressMonitor"):
            arguments["progress_monitor"] = make_progress_monitor(trt, report)
        if not version_rules.strongly_typed:
            arguments.update(_weak_typing(trt, network, types))
        config = _config(module, arguments, options)(builder, network)
        if not options.get("tf32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        for feature in version_rules.preview_features:
            if hasattr(trt.PreviewFeature, feature):  # TensorRT 9 may have made it its default
                config.set_preview_feature(getattr(trt.PreviewFeature, feature), True)
        old_cache = _load_timing_cache(config, timing_cache)
        report(0.02, "building the engine")
        start = time.perf_counter()
        serialized = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - start
    except PolygraphyException as error:
        raise Failure("failed", str(error)) from error
    if serialized is None:
        raise Failure("failed", "TensorRT built no engine; the last errors of the log say why")
    with open(plan, "wb") as file:
        file.write(serialized)
    if timing_cache is not None:
        _save_timing_cache(config, timing_cache)
    del old_cache  # TensorRT uses it until the engine is built
    report(0.98, "reading the layers")
    names = [name for name in trt.BuilderFlag.__members__ if config.get_flag(getattr(trt.BuilderFlag, name))]
    details = {
        "flags": sorted(names + (["STRONGLY_TYPED"] if version_rules.strongly_typed else [])),
        "profiles": len(profiles),
        "builder_s": round(seconds, 3),
        "graph_layers": network.num_layers,
    }
    if options.get("sparsity"):
        details["sparse"] = sparse_layers(told.sparsity)
    engine = _open(trt, get_trt_logger(), serialized, options)
    if engine is not None:
        information, source = engine_layers(trt, engine[1]), "engine"
        details["device_memory_bytes"] = _device_memory(engine[1])
    elif logged := [layer for message in told.layers for layer in logged_layers(message)]:
        information, source = logged, "log of the build"
    else:
        information, source = graph_layers(network), "graph before fusion, as no GPU here can open the engine"
    with open(layers, "w") as file:
        json.dump({"source": source, "layers": information}, file, indent=1)
    return {**details, "layers": {"source": source, **summarize(information)}}


def _open(trt: Any, logger: Any, serialized: Any, options: dict[str, Any]) -> tuple[Any, Any] | None:
    """The runtime and the engine, None where no GPU here is of a kind that the engine is for."""
    here = gpu()["compute_capability"]
    if here is None or here not in options.get("compute_capabilities", [here]):
        return None
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(serialized)
    return None if engine is None else (runtime, engine)


def _profile(profile: Any, shapes: dict[str, list[list[int]]]) -> Any:
    for name, (least, usual, largest) in shapes.items():
        profile.add(name, min=tuple(least), opt=tuple(usual), max=tuple(largest))
    return profile


def _config(module: str, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    if module == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [tuple(map(int, capability.split("."))) for capability in options["compute_capabilities"]]
        return CreateConfigRTX(compute_capabilities=pairs, **arguments)
    from polygraphy.backend.trt import CreateConfig

    return CreateConfig(tf32=options.get("tf32"), **arguments)


ARITHMETIC = frozenset([
    "ACTIVATION", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ELEMENTWISE", "FULLY_CONNECTED", "GRID_SAMPLE", "LRN",
    "MATRIX_MULTIPLY", "NORMALIZATION", "PARAMETRIC_RELU", "POOLING", "RAGGED_SOFTMAX", "REDUCE", "RESIZE", "SCALE",
    "SOFTMAX", "UNARY",
])  # fmt: skip
"""Types of layers whose results depend on the precision that they compute in."""


def _weak_typing(trt: Any, network: Any, types: dict[str, str]) -> dict[str, Any]:
    """Builder flags that the types in the model need, with its fp32 arithmetic pinned where fp16 is allowed.

    Without the pins a weakly typed builder may run in fp16 what the graph keeps in fp32. They are preferences: a layer
    that has no fp32 kernel is named in the log instead of failing the build.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    int8 = any(layer.type.name in ("QUANTIZE", "DEQUANTIZE") for layer in layers)
    given = {tensor.name: types.get(tensor.name, tensor.dtype.name) for layer in layers for tensor in _outputs(layer)}
    fp16 = "HALF" in given.values()
    flags: dict[str, Any] = {"fp16": fp16, "int8": int8}
    if not fp16:
        return flags
    # With Q/DQ, pins on parts of a node would keep it from being int8.
    parts = dict.fromkeys(given.keys() - types.keys(), "HALF") if int8 else _types_of_parts(layers, types)
    given.update(parts)
    quantized = {name for layer in layers if layer.type.name == "DEQUANTIZE" for name in _output_names(layer)}
    pinned = []
    for layer in layers:
        found = {given[name] for name in _output_names(layer)}
        if layer.type.name in ARITHMETIC and found == {"FLOAT"} and not quantized & _input_names(layer):
            layer.precision = trt.DataType.FLOAT
            for index in range(layer.num_outputs):
                layer.set_output_type(index, trt.DataType.FLOAT)
            pinned.append(layer.name)
    if pinned:
        flags["precision_constraints"] = "prefer"
        print(f"{len(pinned)} layers are pinned to fp32: {', '.join(pinned)}", file=sys.stderr)
    return flags


def _types_of_parts(layers: list[Any], types: dict[str, str]) -> dict[str, str]:
    """Types of what the parser made of parts of a node, such as the product inside a Gemm: those of the whole node.

    TensorRT 8.6 tells FLOAT for all of them. A part is read by the node's next layer, and the last one has its name.
    """
    readers = {name: layer for layer in reversed(layers) for name in _input_names(layer)}
    found: dict[str, str] = {}
    for layer in reversed(layers):
        for name in _output_names(layer) - types.keys() & readers.keys():
            for whole in _output_names(readers[name]):
                if kind := found.get(whole) or types.get(whole):
                    found[name] = kind
    return found


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(index) for index in range(layer.num_outputs)]


def _input_names(layer: Any) -> set[str]:
    inputs = (layer.get_input(index) for index in range(layer.num_inputs))
    return {tensor.name for tensor in inputs if tensor is not None}


def _output_names(layer: Any) -> set[str]:
    return {tensor.name for tensor in _outputs(layer)}


def _load_timing_cache(config: Any, path: str | None) -> Any:
    if path is None or not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        cache = config.create_timing_cache(file.read())
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        print(f"the timing cache {path} does not fit this GPU and version, and is left alone", file=sys.stderr)
    return cache


def _save_timing_cache(config: Any, path: str) -> None:
    """Merges with what other builds have written meanwhile, and replaces the file at once."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            with open(path, "rb") as file:
                other = config.create_timing_cache(file.read())
            if other is not None:
                cache.combine(other, ignore_mismatch=False)
        write_atomically(path, cache.serialize())


def _device_memory(engine: Any) -> int:
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)
