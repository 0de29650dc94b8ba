import numpy as np
import pytest

from enginesmith.compiler.pruning.padding import unpadded

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
MASK = np.array([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, bool])
@pytest.mark.parametrize("name", ["attention_mask", "mask", "inputMask"])
def test_padded_tokens_are_left_out(name, dtype):
    kept = unpadded(X, {"ids": np.ones((2, 3), np.int64), name: MASK.astype(dtype)})
    assert kept.tolist() == [X[0, 0].tolist(), X[0, 1].tolist(), X[1, 0].tolist()]


@pytest.mark.parametrize(
    "sample",
    [
        {"token_type_ids": MASK},
        {"key_padding_mask": MASK},
        {"mask": MASK.astype(np.float32)},
        {"mask": MASK * 2},
        {"mask": MASK[:, :2]},
        {"mask": np.array([[1, 1, 0], [0, 0, 0]])},
        {"mask": np.ones((2, 3), np.int64)},
    ],
    ids=["types of tokens", "ones are padding", "floats", "counts", "another length", "an empty row", "nothing padded"],
)
def test_what_is_no_mask(sample):
    assert unpadded(X, sample) is X


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4)])
def test_only_tokens_are_told(shape):
    x = np.zeros(shape, np.float32)
    assert unpadded(x, {"mask": MASK}) is x
