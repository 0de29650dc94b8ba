import ctypes

import numpy as np
import pytest

from enginesmith.errors import DataError
from enginesmith.targets.cuda import dlpack
from enginesmith.targets.cuda.dlpack import borrow, cuda_device

FLOAT32 = np.dtype("float32")


class Tensor:
    """A DLPack tensor that is no NumPy array to `cuda_device`."""

    def __init__(self, array, device=(2, 1)):
        self.array = array
        self.device = device
        self.streams = []

    def __dlpack__(self, *, stream):
        self.streams.append(stream)
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device


def read(borrowed):
    data = (ctypes.c_char * borrowed.size_bytes).from_address(borrowed.address)
    return np.frombuffer(data, borrowed.dtype).reshape(borrowed.shape)


def test_the_device_is_told_without_touching_the_tensor():
    array = np.zeros(1, np.float32)
    assert cuda_device(Tensor(array)) == 1
    assert cuda_device(Tensor(array, (13, 0))) == 0
    assert cuda_device(Tensor(array, (1, 0))) is None
    assert cuda_device(array) is None
    assert cuda_device(np.float32(1)) is None
    assert cuda_device([1.0]) is None


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(12, dtype=np.float32).reshape(4, 3)[2:],
        np.arange(6, dtype=np.float32).reshape(2, 3)[:1, None],
        np.array(3, np.float32),
    ],
    ids=["whole", "offset", "size-one axes", "scalar"],
)
def test_the_memory_is_that_of_the_tensor(array):
    tensor = Tensor(array)
    borrowed = borrow("x", tensor, FLOAT32, 77)
    assert tensor.streams == [77]
    assert borrowed.address == array.ctypes.data
    np.testing.assert_array_equal(read(borrowed), array)


def test_the_memory_lives_as_long_as_it_is_borrowed():
    borrowed = borrow("x", Tensor(np.full((1000, 1000), 5, np.float32)), FLOAT32, None)
    np.empty((1000, 1000), np.float32).fill(0)
    assert (read(borrowed) == 5).all()


def test_elements_must_lie_in_order():
    with pytest.raises(
        DataError, match=r"input 'x' is not contiguous\n.*C order\n.*strides \(1, 3\)\n.*contiguous\(\)"
    ):
        borrow("x", Tensor(np.zeros((2, 3), np.float32).T), FLOAT32, None)


def test_a_tensor_that_refuses_is_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(DataError, match=r"input 'x' cannot be shared by DLPack: .*gradient"):
        borrow("x", torch.ones(2, requires_grad=True), FLOAT32, None)


def test_torch_tensors_are_read_in_place():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(6.0).reshape(2, 3)
    assert borrow("x", tensor, FLOAT32, None).address == tensor.data_ptr()


def test_kinds_are_those_of_dlpack_h():
    assert dlpack.CUDA_KINDS == (2, 13)
