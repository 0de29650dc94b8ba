"""Measures ceilings: products, copies and kernels that do nothing, each the best of several runs.

On the CPU products run in ONNX Runtime and in torch, whichever is faster, as both have kernels of engines. Half
precision is measured where the processor has instructions for it; elsewhere it is emulated. Bandwidth is that of the
triad a = b + s c of McCalpin's STREAM, its three arrays counted once each.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import EngineError
from ..benchmark.cpu_monitor import ForeignCpu
from ..machine.environment import cpu_flags, environment
from .ceilings import Ceilings, Device

if TYPE_CHECKING:
    import onnx

EACH_S = 0.12
"""Seconds that each ceiling is measured for, one run at least."""

LENGTH = 512
GPU_LENGTH = 8192
"""Of the sides of the matrices: on a CPU so short that a product is done before other processes get their turn."""

WORKING_BYTES = (2**18, 2**21, 2**24, 2**27, 3 * 2**27)
GPU_WORKING_BYTES = (2**20, 2**23, 2**25, 2**28, 2**31)
CHAIN = (16, 144)
"""Nodes of the two graphs whose times differ by the launches of nodes that do nothing."""

_HALF = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "asimdhp")}
"""Flags of processors that compute in half precision."""


def measure(device: Device) -> Ceilings:
    """All ceilings of a device.

    Raises:
        EngineError: torch finds no such device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("the ceilings of the GPU cannot be measured", found="torch without CUDA, or without a GPU")
    foreign = ForeignCpu()
    with torch.inference_mode():
        found: dict[str, Any] = _gpu() if device == "cuda" else _cpu()
    return Ceilings(device=device, busy=foreign.share(), **found)


def _cpu() -> dict[str, Any]:
    flags = cpu_flags()
    gflops = {"fp32": max(_torch_product("float32", LENGTH), _session_product("float32", LENGTH))}
    for precision, names in _HALF.items():
        if flags & set(names):
            gflops[precision] = _torch_product({"bf16": "bfloat16", "fp16": "float16"}[precision], LENGTH)
    if narrow := _session_product("int8", LENGTH):
        gflops["int8"] = narrow
    unaligned = max(_torch_product("float32", LENGTH - 1), _session_product("float32", LENGTH - 1))
    return {
        "name": str(environment().get("cpu", {}).get("model", "CPU")),
        "gflops": gflops,
        "unaligned_gflops": {"fp32": min(unaligned, gflops["fp32"])},
        "bandwidths": tuple((float(size), _triad_gb_s(size, "cpu")) for size in WORKING_BYTES),
        "launch_us": _launch_us(),
    }


def _gpu() -> dict[str, Any]:
    import torch

    gflops, unaligned = {}, {}
    for precision, dtype in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"), ("int8", "int8")):
        length = GPU_LENGTH // (2 if precision == "fp32" else 1)
        gflops[precision] = _torch_product(dtype, length, "cuda")
        if precision != "int8":  # torch multiplies 8-bit matrices of multiples of 8 only
            unaligned[precision] = min(_torch_product(dtype, length - 1, "cuda"), gflops[precision])
    plain, within = _gpu_launches_us()
    return {
        "name": torch.cuda.get_device_name(),
        "gflops": gflops,
        "unaligned_gflops": unaligned,
        "bandwidths": tuple((float(size), _triad_gb_s(size, "cuda")) for size in GPU_WORKING_BYTES),
        "launch_us": plain,
        "graph_launch_us": within,
        "transfer_gb_s": _transfer_gb_s(),
    }


def _torch_product(dtype: str, length: int, device: Device = "cpu") -> float:
    """GFLOP/s of a product of square matrices in torch."""
    import torch

    kind = getattr(torch, dtype)
    if kind is torch.int8:
        factors = [torch.randint(-8, 8, (length, length), dtype=kind, device=device) for _ in range(2)]
        return _gflops(lambda: torch._int_mm(factors[0], factors[1].t()), length, device)
    first, second = (torch.ones(length, length, dtype=kind, device=device) for _ in range(2))
    out = torch.empty_like(first)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return _gflops(lambda: torch.mm(first, second, out=out), length, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _session_product(dtype: str, length: int) -> float:
    """GFLOP/s of a product in ONNX Runtime's CPU kernels; 0 where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return 0.0
    import numpy as np

    narrow = dtype == "int8"
    weight = np.ones((length, length), np.int8 if narrow else np.float32)
    operator = ("MatMulInteger", "uint8", "int32") if narrow else ("MatMul", "float", "float")
    run = _session(_product_graph(*operator, weight), np.ones((length, length), np.uint8 if narrow else np.float32))
    return _gflops(run, length, "cpu")


def _gflops(run: Callable[[], object], length: int, device: Device) -> float:
    return 2 * length**3 / best_s(run, device) / 1e9


def _triad_gb_s(working_bytes: int, device: Device) -> float:
    import torch

    first, second, out = (torch.ones(working_bytes // 12, device=device) for _ in range(3))

    def run() -> float:
        return best_s(lambda: torch.add(first, second, alpha=3.0, out=out), device)

    threads = torch.get_num_threads()
    if device == "cuda" or threads == 1:
        return working_bytes / run() / 1e9
    shared = run()
    torch.set_num_threads(1)  # what is small is faster without waiting for other threads
    try:
        return working_bytes / min(shared, run()) / 1e9
    finally:
        torch.set_num_threads(threads)


def _launch_us() -> float:
    """What a node that does nothing adds to a call: in ONNX Runtime, or of torch where that is not installed."""
    import numpy as np
    import torch

    one = np.ones(1, np.float32)
    if importlib.util.find_spec("onnxruntime") is None:
        tensor = torch.ones(1)
        return 1e6 * best_s(lambda: [tensor.neg_() for _ in range(CHAIN[1])], "cpu") / CHAIN[1]
    short, long = (best_s(_session(_chain_graph(count), one), "cpu") for count in CHAIN)
    return max(0.05, 1e6 * (long - short) / (CHAIN[1] - CHAIN[0]))


def _gpu_launches_us() -> tuple[float, float]:
    """Of a kernel that does nothing: launched by the host, and within a CUDA graph."""
    import torch

    tensor, count = torch.ones(1, device="cuda"), CHAIN[1]

    def run() -> None:
        for _ in range(count):
            tensor.neg_()

    run()
    plain = best_s(run, "cuda") / count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e6 * plain, 1e6 * best_s(graph.replay, "cuda") / count


def _transfer_gb_s() -> float:
    import torch

    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    return 2**26 / best_s(lambda: device.copy_(host, non_blocking=True), "cuda") / 1e9


def best_s(run: Callable[[], object], device: Device) -> float:
    """Seconds of the fastest of as many runs as take `EACH_S`, three at least."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    best, deadline, count = math.inf, time.perf_counter() + EACH_S, 0
    while count < 3 or time.perf_counter() < deadline:
        best = min(best, timed())
        count += 1
    return best


def _session(model: onnx.ModelProto, array: Any) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": array})


def _product_graph(operator: str, given: str, made: str, weight: Any) -> onnx.ModelProto:
    import onnx.numpy_helper
    import onnx.parser

    length = weight.shape[0]
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({given}[{length},{length}] x) => ({made}[{length},{length}] y) '
        f"{{ y = {operator}(x, w) }}"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def _chain_graph(nodes: int) -> onnx.ModelProto:
    import onnx.parser

    body = " ".join(f"x{number + 1} = Neg(x{number})" for number in range(nodes))
    text = body.replace("(x0)", "(x)")
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] x{nodes}) {{ {text} }}'
    )
