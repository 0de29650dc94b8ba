"""How attention over caches is divided: few programs split caches, and no block is larger than registers hold."""

from __future__ import annotations

import pytest
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from enginesmith.targets.inductor.division import Division


def of(rows=1, heads=8, shared=1, width=64, length=1024):
    return Division.of(rows, heads, shared, width, length)


def test_caches_of_few_rows_are_split_and_those_of_many_are_not():
    assert (of().tokens, of().splits) == (32, 32)
    assert (of(shared=4).tokens, of(shared=4).splits) == (64, 16)
    assert (of(rows=17).tokens, of(rows=17).splits) == (1024, 1)


def test_caches_of_a_number_of_rows_that_calls_tell_are_split():
    found = of(rows=ShapeEnv().create_unbacked_symint())
    assert (found.tokens, found.splits) == (256, 4)


@pytest.mark.parametrize("rows", [1, ShapeEnv().create_unbacked_symint()], ids=["one row", "any number"])
def test_parts_of_long_caches_are_longer(rows):
    assert of(rows=rows, length=131072).splits == 128
    assert of(rows=rows, length=40000).tokens == 512


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("shared", [1, 8])
@pytest.mark.parametrize("width", [8, 64, 80, 128, 256, 512])
def test_blocks_fit_into_registers(rows, shared, width):
    found = of(rows=rows, shared=shared, width=width)
    assert width <= found.block_d
    assert found.block_d * found.block_t <= 64 * 32 * found.warps
    assert min(found.block_d, found.block_t) >= 16


def test_heads_that_share_a_cache_are_one_program_up_to_what_tensor_cores_multiply():
    assert [of(shared=shared).group for shared in (1, 2, 16, 71)] == [1, 16, 16, 16]
