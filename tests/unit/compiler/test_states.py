import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.data import open_data, random_batch
from enginesmith.compiler.signature import AxisRange, Signature
from enginesmith.compiler.states import (
    class_scores,
    completed,
    in_the_middle,
    longest_draft,
    made_up,
    max_length,
    next_tokens,
    vocabulary,
)
from enginesmith.compiler.trial import sized
from enginesmith.errors import DataError

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))


@pytest.fixture
def signature():
    return small["signature"]()


def test_a_signature_with_states_is_read_back(signature):
    assert Signature.from_json(signature.to_json()) == signature
    assert "states" not in Signature(signature.inputs).to_json()  # as bundles of other models always were


def test_sizes_are_read_from_the_signature(signature):
    assert (max_length(signature), vocabulary(signature)) == (16, 11)
    assert vocabulary(Signature(signature.inputs, states=signature.states)) is None


def test_random_calls_fit_into_the_caches_and_leave_the_rest_empty(signature):
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        batch = random_batch(signature, generator, {"batch": 3, "time": 4})
        signature.check(batch)
        assert (batch["past"] + 4 <= 16).all()
        assert ((batch["count"] >= 1) & (batch["count"] <= 4)).all()
        for row, past in enumerate(batch["past"]):
            assert batch["key"][row, :, :past].all()
            assert not batch["key"][row, :, past:].any()
        seen |= {*batch["ids"].flatten().tolist()}
    assert seen == set(range(11))


def test_tokens_alone_are_prompts(signature):
    batch = completed(signature, {"ids": np.ones((2, 5), np.int32), "next": np.zeros(2)})
    signature.check({name: array for name, array in batch.items() if name != "next"})
    assert batch["past"].tolist() == [0, 0]
    assert batch["count"].tolist() == [5, 5]
    assert not batch["key"].any()
    assert batch["next"].shape == (2,)


def test_data_of_a_decoder_may_be_tokens_alone(signature, tmp_path):
    np.savez(tmp_path / "test.npz", ids=np.arange(8).reshape(2, 4), next=np.array([4, 8]))
    batches = list(open_data(str(tmp_path / "test.npz"), signature).labelled())
    assert [batch["ids"].tolist() for batch in batches] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert [batch["next"].tolist() for batch in batches] == [[4], [8]]
    assert batches[0]["key"].shape == (1, 2, 16, 8)


def test_some_of_the_caches_are_not_enough(signature):
    key = np.zeros((1, 2, 16, 8), np.float32)
    with pytest.raises(DataError, match=r"(?s)data hold some of the caches, and not 'value'.*all of them, or none"):
        completed(signature, {"ids": np.zeros((1, 2), np.int64), "key": key})


def test_other_data_are_left_to_the_check(signature):
    with pytest.raises(DataError, match="the wrong rank"):
        signature.check(
            completed(signature, {**random_batch(signature, np.random.default_rng(0)), "ids": np.zeros(3, int)})
        )


def test_what_is_timed_are_caches_that_are_half_full(signature):
    batch = made_up(signature, random_batch(signature, np.random.default_rng(0)), np.random.default_rng(0))
    middle = in_the_middle(signature, batch)
    assert middle["past"].tolist() == [8]
    timed = sized(signature, batch, {"batch": 2, "time": 12})
    assert timed.arrays["past"].tolist() == [4, 4]
    assert timed.arrays["count"].tolist() == [12, 12]


def test_a_decoder_that_checks_drafts_takes_one_token_more_than_a_draft(signature):
    checking = small["signature"](3)
    assert (longest_draft(signature), longest_draft(checking)) == (0, 3)
    short = dataclasses.replace(checking, axes={**checking.axes, "time": AxisRange(1, 1, 2)})
    assert longest_draft(short) == 1
    assert (class_scores(signature), class_scores(checking)) == (frozenset(), {"logits"})


def test_calls_that_look_back_are_made_up_and_completed():
    checking, generator, seen = small["signature"](3), np.random.default_rng(0), set()
    for _ in range(20):
        batch = random_batch(checking, generator, {"batch": 2, "time": 5, "kept": 4})
        checking.check(batch)
        seen |= {*batch["back"].tolist()}
    assert seen == set(range(5))
    assert in_the_middle(checking, batch)["back"].tolist() == [0] * 4
    batch = completed(checking, {"ids": np.ones((2, 5), np.int64)})
    checking.check(batch)
    assert batch["back"].tolist() == [0]


def test_rows_of_a_decoder_stack_along_the_axis_of_its_caches(tmp_path):
    checking = small["signature"](3)
    assert checking.batch_axis == "batch"
    np.savez(tmp_path / "test.npz", ids=np.arange(6).reshape(3, 2), back=np.array([1, 0]))
    inputs = tuple(
        dataclasses.replace(spec, shape=tuple(1 if size == "batch" else size for size in spec.shape))
        for spec in checking.inputs
    )
    alone = dataclasses.replace(checking, inputs=inputs)
    assert alone.batch_axis is None
    for taken in (checking, alone):
        batches = list(open_data(str(tmp_path / "test.npz"), taken))
        assert [(batch["ids"].tolist(), batch["back"].tolist()) for batch in batches] == [
            ([[0, 1]], [1, 0]), ([[2, 3]], [1, 0]), ([[4, 5]], [1, 0]),
        ]  # fmt: skip
        assert sized(taken, batches[0], taken.sizes()).batch == 1


@pytest.mark.parametrize("past", [0, 4, 14])
def test_a_token_more_of_several_rows_is_of_rows_that_differ(signature, past):
    batch = random_batch(signature, np.random.default_rng(0), {"batch": 2, "time": 2})
    batch |= {"past": np.array([past, 1]), "count": np.array([2, 1])}
    outputs = {f"{name}_out": np.random.default_rng(1).standard_normal(batch[name].shape) for name in signature.states}
    following = next_tokens(signature, batch, {**outputs, "logits": np.zeros(2)}, 3)
    following = {name: array.astype(signature.input(name).dtype) for name, array in following.items()}
    assert signature.check(following) == {"batch": 3, "time": 1}
    filled = min(past + 2, 15)
    assert following["past"].tolist() == [filled, 1, filled - 2]
    assert following["ids"][:, 0].tolist() == [batch["ids"][0, 0], batch["ids"][1, 1], batch["ids"][0, 0]]
    for row, (source, gone) in enumerate([(0, 0), (1, 1), (0, 2)]):
        kept, end = following["key"][row], int(following["past"][row])
        np.testing.assert_array_equal(kept[:, :end], outputs["key_out"][source][:, gone:][:, :end].astype(np.float32))
        assert not kept[:, end:].any()


def test_a_token_more_of_a_decoder_that_drops_or_looks_back():
    checking = small["signature"](3)
    inputs = (*checking.inputs, dataclasses.replace(checking.input("past"), name="position"))
    dropping = dataclasses.replace(checking, inputs=inputs, positions=40)
    batch = random_batch(dropping, np.random.default_rng(0), {"batch": 1, "time": 5, "kept": 2})
    following = next_tokens(dropping, batch, {output: batch[name] for name, output in dropping.states.items()}, 3)
    assert dropping.check(following) == {"batch": 3, "time": 1, "kept": 2}
    assert following["position"].tolist() == [batch["position"][0] + batch["count"][0]] * 3
    assert following["back"].tolist() == [0, 0]
