"""The configuration of a model for Triton (config.pbtxt), as text.

Its fields are those of Triton's model_config.proto.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from ..compiler.signature import Signature, TensorSpec
from .layout import TYPES, Layout, dims
from .settings import Serving

Kind = Literal["cpu", "gpu"]
MARK = "enginesmith"
"""Parameter that every configuration of ours has; its value is the engine."""


def config(
    name: str,
    signature: Signature,
    settings: Serving,
    layout: Layout,
    *,
    backend: str,
    engine: str,
    kind: Kind,
    platform: str = "",
    file: str = "",
    preferred: Sequence[int] = (),
    parameters: Mapping[str, str] | None = None,
    warmup: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """The text of config.pbtxt.

    Args:
        layout: how requests are merged; `settings.max_batch` bounds it further.
        kind: where instances of the model run.
        platform: older name of the backend and its format, which some tools still want.
        file: the model's file in the folder of its version, where it has not the default name.
        preferred: batches to merge to.
        parameters: of the backend.
        warmup: shape of each input, the batch axis left out, whose values stand in ``warmup/<name>``; none for no
            warm-up.
    """
    merged = layout.max_batch > 0
    largest = min(layout.max_batch, settings.max_batch or layout.max_batch)
    lines = [f"backend: {_text(backend)}"]
    lines += [f"platform: {_text(platform)}"] if platform else []
    lines += [f"default_model_filename: {_text(file)}"] if file else []
    lines += [f"max_batch_size: {largest}"]
    lines += [_tensor("input", spec, merged) for spec in signature.inputs]
    lines += [_tensor("output", spec, merged) for spec in signature.outputs]
    lines.append(instances(settings, kind))
    if merged and settings.merge:
        lines.append(_batching(settings, [size for size in preferred if size <= largest]))
    if warmup:
        lines.append(_warmup(signature, warmup, merged))
    for key, value in {**(parameters or {}), MARK: engine}.items():
        lines.append(f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}")
    return naming(name) + "\n".join(lines) + "\n"


def naming(name: str) -> str:
    """The first line, which says the model's name: that of its folder."""
    return f"name: {_text(name)}\n"


def _tensor(field: str, spec: TensorSpec, merged: bool) -> str:
    found, added = dims(spec, merged=merged)
    reshape = " reshape { shape: [ ] }" if added else ""
    return f"{field} {{ name: {_text(spec.name)} data_type: TYPE_{TYPES[spec.dtype]} dims: {found}{reshape} }}"


def instances(settings: Serving, kind: Kind) -> str:
    """How many copies of the model run where."""
    gpus = f" gpus: {list(settings.gpus)}" if settings.gpus and kind == "gpu" else ""
    return f"instance_group {{ count: {settings.instances} kind: KIND_{kind.upper()}{gpus} }}"


def _batching(settings: Serving, preferred: Sequence[int]) -> str:
    parts = [f"  preferred_batch_size: {sorted(preferred)}"] if preferred else []
    parts.append(f"  max_queue_delay_microseconds: {settings.queue_delay_us}")
    if settings.priorities:
        middle = (settings.priorities + 1) // 2
        parts.append(f"  priority_levels: {settings.priorities}\n  default_priority_level: {middle}")
    if settings.bounds_queue:  # only then: see Serving.stalls
        parts.append(f"  default_queue_policy {{ {_policy(settings)} }}")
    return "dynamic_batching {\n" + "\n".join(parts) + "\n}"


def _policy(settings: Serving) -> str:
    policy = ["timeout_action: REJECT", "allow_timeout_override: true"]
    if settings.max_queue is not None:
        policy.append(f"max_queue_size: {settings.max_queue}")
    if settings.timeout_ms is not None:
        policy.append(f"default_timeout_microseconds: {max(1, round(settings.timeout_ms * 1000))}")
    return " ".join(policy)


def _warmup(signature: Signature, shapes: Mapping[str, Sequence[int]], merged: bool) -> str:
    inputs = [
        f"  inputs {{ key: {_text(spec.name)} value {{ data_type: TYPE_{TYPES[spec.dtype]} "
        f"dims: {list(shapes[spec.name]) or [1]} input_data_file: {_text(warmup_file(number))} }} }}"
        for number, spec in enumerate(signature.inputs)
    ]
    return "model_warmup {\n" + "\n".join([f'  name: "reference" batch_size: {int(merged)}', *inputs]) + "\n}"


def warmup_file(number: int) -> str:
    """The file of an input's values in the model's folder ``warmup``; names of inputs may be no names of files."""
    return f"input-{number}.raw"


def _text(value: str) -> str:
    return json.dumps(value)
