"""A model as an ONNX graph: `onnx_ir.Model` with loading and saving that are safe above 2 GB, identity and types.

Tensors are values: a pass replaces a tensor and never writes into its array, because clones share tensors and their
hashes are kept.
"""

from __future__ import annotations

import collections
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from ...errors import GraphError, StorageError
from .identity import model_digest, unmap
from .verifier import verify

logging.getLogger("onnx_ir").addHandler(logging.NullHandler())  # its warnings come back as errors of `verify`

INLINE_BYTES = 1 << 20
"""Weights above this in total are saved beside the model."""

_PROTO_LIMIT = (1 << 31) - 1
_HELD_OUT_BYTES = 1024
"""Inference reads values of small tensors only: shapes, axes, scales."""


class Graph:
    """A model whose nodes passes rewrite through `model`."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    @classmethod
    def load(cls, path: Path | str) -> Graph:
        """Reads an ONNX file; external weights stay on disk, memory-mapped. Call `verify` on files of unknown origin.

        Raises:
            GraphError: the file is not ONNX, is newer than this onnx package, repeats a name, or its external data is
                missing, too short or outside its folder.
        """
        path = Path(path)
        try:
            proto = onnx.load(path, format="protobuf", load_external_data=False)
        except OSError as error:
            raise GraphError(f"cannot read {path}: {error.strerror}") from error
        except (DecodeError, UnicodeDecodeError, ValueError) as error:
            raise GraphError(f"{path} is not a whole ONNX model", found=str(error)) from error
        if not proto.ir_version or not proto.graph.output:
            raise GraphError(f"{path} is not an ONNX model", expected="a graph with outputs", found="none")
        if proto.ir_version > onnx.IR_VERSION:
            raise GraphError(
                f"{path} is newer than the installed onnx {onnx.__version__}",
                expected=f"IR version {onnx.IR_VERSION} or older",
                found=proto.ir_version,
                hint="upgrade onnx, or export for an older version",
            )
        graph = cls.from_proto(proto)
        for owner, key, tensor in graph._tensors():
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = os.path.abspath(path.parent)
                _check_external(tensor)
                if isinstance(owner, ir.Node):  # onnx_ir moves initializers alone to another file on saving
                    owner.attributes[key] = ir.AttrTensor(key, ir.Tensor(tensor.numpy(), name=tensor.name))
        return graph

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto) -> Graph:
        """Makes a graph from a protobuf message.

        Raises:
            GraphError: a name is given twice, or the message makes no graph.
        """
        seen: set[str] = set()
        for tensor in proto.graph.initializer:
            if tensor.name in seen:
                raise GraphError(f"initializer {tensor.name!r} is given twice", hint="export the model again")
            seen.add(tensor.name)
        try:
            return cls(ir.serde.deserialize_model(proto))
        except ir.serde.SerdeError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise GraphError("the ONNX file makes no graph", found=cause, hint="export the model again") from error

    def save(self, path: Path, *, external: bool | None = None) -> None:
        """Writes the model, with its weights in ``<name>.data`` beside it where `external` (None: above 1 MiB).

        The files are written beside their place and renamed, so that a failure leaves what was there before.

        Raises:
            GraphError: the weights are read from the very file that would be replaced.
            StorageError: the disk is full or cannot be written.
        """
        path = Path(path)
        data = path.with_name(path.name + ".data")
        for _, _, tensor in self._tensors():
            if isinstance(tensor, ir.ExternalTensor) and data.exists() and os.path.samefile(tensor.path, data):
                raise GraphError(f"the weights are read from {data} itself", hint="save under another name")
        if external is None:
            external = self.weight_bytes > INLINE_BYTES
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                written = Path(folder) / path.name
                if external:
                    ir.save(self.model, written, format="protobuf", external_data=data.name)
                else:
                    written.write_bytes(self.to_proto().SerializeToString())
                for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == path.name):  # the model last
                    file.replace(path.parent / file.name)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror}", hint="free space, or choose a folder"
            ) from error
        finally:
            for _, _, tensor in self._tensors():
                unmap(tensor)

    def to_proto(self) -> onnx.ModelProto:
        """The model as one protobuf message with its weights inside.

        Raises:
            GraphError: it is above 2 GB, the limit of protobuf; use `save`.
        """
        if self.weight_bytes > _PROTO_LIMIT:
            raise self._too_large()
        copy = self.clone()
        copy.detach()
        proto = ir.serde.serialize_model(copy.model)
        if proto.ByteSize() > _PROTO_LIMIT:
            raise self._too_large()
        return proto

    def _too_large(self) -> GraphError:
        return GraphError(
            "the model is too large for one protobuf message",
            expected="at most 2 GB",
            found=f"{self.weight_bytes / 1e9:.1f} GB of weights",
            hint="save it with external weights",
        )

    def detach(self) -> None:
        """Holds on to external weights by their memory maps, so that the files may be renamed or deleted."""
        for owner, _, tensor in self._tensors():
            if isinstance(owner, ir.Value) and isinstance(tensor, ir.ExternalTensor):
                owner.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)

    def clone(self) -> Graph:
        """An independent graph that shares its tensors with this one."""
        return Graph(self.model.clone())

    def verify(self) -> None:
        """Checks every rule of `verifier`.

        Raises:
            GraphError: the first rule that is broken, with node and tensor.
        """
        verify(self.model)

    def infer(self) -> None:
        """Fills in shapes and types, in subgraphs too; weights are left out of what onnx sees.

        Raises:
            GraphError: shapes or types contradict each other.
        """
        copy = self.clone()
        for owner, key, tensor in copy._tensors():
            if tensor.nbytes <= _HELD_OUT_BYTES or tensor.dtype == ir.DataType.STRING:
                continue
            stub = ir.ExternalTensor("", 0, tensor.nbytes, tensor.dtype, shape=_static(tensor), name=tensor.name or "")
            if isinstance(owner, ir.Value):
                owner.const_value = stub
            else:
                owner.attributes[key] = ir.AttrTensor(key, stub)
        inferred = ir.serde.deserialize_model(_infer(ir.serde.serialize_model(copy.model)))
        for mine, theirs in zip(_scopes(self.model), _scopes(inferred), strict=True):
            found = {value.name: value for value in _values(theirs)}
            for value in _values(mine):
                other = found.get(value.name)
                if other is None or (mine is self.model.graph and (value in mine.inputs or value in mine.outputs)):
                    continue  # what the model promises stays as it says
                value.type = other.type or value.type
                value.shape = other.shape if other.shape is not None else value.shape

    def fingerprint(self) -> str:
        """SHA-256 of structure, names, weights and marks; independent of doc strings and where weights lie."""
        return model_digest(self.model)

    def graphs(self) -> Iterator[ir.Graph]:
        """The main graph, every function's, and all subgraphs of these."""
        return _scopes(self.model)

    def nodes(self) -> Iterator[ir.Node]:
        """Every node of main graph, subgraphs and functions."""
        for graph in self.graphs():
            yield from graph

    @property
    def opset(self) -> int:
        """Version of the default ONNX domain."""
        return self.model.opset_imports.get("", 0)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs that a caller gives; those with a default value are left out."""
        return tuple(v.name or "" for v in self.model.graph.inputs if not v.is_initializer())

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs in the model's order."""
        return tuple(v.name or "" for v in self.model.graph.outputs)

    def operators(self) -> collections.Counter[str]:
        """How often each operator occurs, as ``Conv`` or ``com.microsoft::FusedMatMul``."""
        return collections.Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in self.nodes())

    def precisions(self) -> dict[str, int]:
        """How many nodes give each dtype as first output (``float16``); ``unknown`` before `infer`."""
        found = (node.outputs[0].dtype for node in self.nodes() if node.outputs)
        return dict(collections.Counter("unknown" if d is None else _dtype_name(d) for d in found))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in initializers and attributes."""
        return sum(tensor.nbytes for _, _, tensor in self._tensors() if tensor.dtype != ir.DataType.STRING)

    def _tensors(self) -> Iterator[tuple[ir.Value | ir.Node, str, ir.TensorProtocol]]:
        for graph in self.graphs():
            for value in list(graph.initializers.values()):
                if value.const_value is not None:
                    yield value, value.name or "", value.const_value
            for node in graph:
                for key, attribute in list(node.attributes.items()):
                    if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                        yield node, key, attribute.as_tensor()


def _scopes(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.graph.subgraphs()


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _static(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(list(tensor.shape.numpy()))


def _dtype_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError:
        pass  # propagating data fails in branches that hold equal names, with "Data for input 0 already exists"
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise GraphError("shapes or types contradict each other", found=str(error).strip()) from error


def _check_external(tensor: ir.ExternalTensor) -> None:
    """Refuses what would fail, or read another's file, when the weights are wanted later."""
    try:
        tensor._check_path_containment()
    except ValueError as error:
        raise GraphError(
            f"external data of tensor {tensor.name!r} lies outside the model's folder",
            expected=f"a file inside {tensor.base_dir}",
            found=error,
            hint="copy the data file into the model's folder; links do not count",
        ) from error
    if not os.path.isfile(tensor.path):
        raise GraphError(
            f"external data of tensor {tensor.name!r} is missing",
            expected=tensor.path,
            hint="put the data file beside the model",
        )
    end, size = (tensor.offset or 0) + (tensor.length or tensor.nbytes), os.path.getsize(tensor.path)
    if end > size or (tensor.length or tensor.nbytes) < tensor.nbytes:
        raise GraphError(
            f"external data of tensor {tensor.name!r} is cut short",
            expected=f"{tensor.nbytes} bytes from {tensor.offset or 0} in {tensor.path}",
            found=f"length {tensor.length}, a file of {size} bytes",
            hint="copy or download the data file again",
        )
