"""Builds what `trtexec --onnx=... --fp16 --saveEngine=...` does: trtexec.py ONNX PLAN TIMING_CACHE

Runs in the interpreter that has TensorRT, and needs nothing else. trtexec is not in the Python package; these are its
defaults: weakly typed, TF32 allowed, builder level 3, all of the GPU's memory. Before TensorRT 10 kernels of cuBLAS and
cuDNN are left out, which enginesmith does too: their versions would have to match.

Prints {"builder_s", "layers"}, {"parser": why it refused the file} or {"error": ...} as the last line.
"""

import json
import os
import sys
import time

import tensorrt as trt

OWN_KERNELS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")


def build(onnx: str, plan: str, cache: str) -> dict:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    old = int(trt.__version__.split(".")[0]) < 10
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) if old else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        return {"parser": "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))}
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    if old:
        config.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, name)) for name in OWN_KERNELS))
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)  # for a second set of buffers
    timings = b""
    if os.path.exists(cache):
        with open(cache, "rb") as file:
            timings = file.read()
    config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False)
    start = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if serialized is None:
        return {"error": "TensorRT built no engine; its log says why"}
    with open(plan, "wb") as file:
        file.write(serialized)
    with open(cache + f".{os.getpid()}", "wb") as file:
        file.write(config.get_timing_cache().serialize())
    os.replace(file.name, cache)
    return {"tensorrt": trt.__version__, "builder_s": round(seconds, 1), "layers": network.num_layers}


if __name__ == "__main__":
    print(json.dumps(build(*sys.argv[1:4])))
