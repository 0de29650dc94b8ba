"""Takes the CUDA tensors of other libraries as inputs, and gives outputs to them, by DLPack and without a copy.

ONNX Runtime's own reader loses the difference between bool and uint8 in some versions, and takes no stream.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import numpy as np

from ...errors import DataError

CUDA_KINDS = (2, 13)
"""kDLCUDA and kDLCUDAManaged of dlpack.h."""


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """Memory of a tensor on a device, valid while this lives."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def size_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class DeviceTensor:
    """An output on the device. ``torch.from_dlpack`` and the like take it as it is, `numpy` copies it to the host."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.shape = tuple(value.shape())
        self.dtype = ort_dtype(value)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule over the same memory; the values are complete, so no stream has to wait."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("only the memory itself can be shared; numpy() copies it to the host")
        return self._value._get_c_value().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._value._get_c_value().__dlpack_device__()
        return device

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype=dtype)

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        array: np.ndarray = self._value.numpy()
        return array


def cuda_device(value: Any) -> int | None:
    """Number of the CUDA device that a DLPack tensor lies on; None where it is an array or lies elsewhere."""
    if isinstance(value, (np.ndarray, np.generic)) or not hasattr(value, "__dlpack_device__"):
        return None
    kind, number = value.__dlpack_device__()
    return int(number) if kind in CUDA_KINDS else None


def require_device(name: str, found: int, wanted: int) -> None:
    """Raises DataError where the tensor of an input lies on another device than the engine."""
    if found != wanted:
        raise DataError(f"input {name!r} lies on another device", expected=f"cuda:{wanted}", found=f"cuda:{found}")


def borrow(name: str, value: Any, dtype: np.dtype[Any], stream: int | None) -> Borrowed:
    """The memory of the tensor `value`, readable on `stream` once the work that produces it is done.

    Raises:
        DataError: the tensor cannot be shared, or its elements do not lie one after the other.
    """
    try:
        capsule = value.__dlpack__(stream=stream)
    except (BufferError, RuntimeError, TypeError) as error:
        raise DataError(f"input {name!r} cannot be shared by DLPack: {error}", found=type(value).__name__) from error
    tensor = _DLTensor.from_address(_get_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    if strides is not None and not _compact(shape, strides):
        raise DataError(
            f"input {name!r} is not contiguous", expected="C order", found=f"strides {strides}", hint="x.contiguous()"
        )
    return Borrowed((tensor.data or 0) + tensor.byte_offset, shape, dtype, capsule)


def ort_dtype(value: Any) -> np.dtype[Any]:
    """The dtype of an OrtValue, whose types are named as in ``tensor(float)``."""
    name: str = value.data_type().removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def _compact(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
