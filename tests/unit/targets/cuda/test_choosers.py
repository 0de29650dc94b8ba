"""The graphs that choose tokens, run on the CPU: the same tokens as on the host."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from enginesmith.compiler.generation.sampling import Sampling, options_of
from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.targets.cuda.choosers import AMONG, DRAW, GREEDY, graphs, write

SIZE = 600  # three blocks, the last one not full


@pytest.fixture(scope="module", params=["float32", "float16"])
def choosers(request):
    made = {
        name: onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for name, model in graphs(SIZE, request.param).items()
    }
    return made, request.param


class Drawing:
    """A generator whose next number is known."""

    def __init__(self, number):
        self._number = number

    def random(self):
        return self._number


def logits(seed, dtype, *, ties):
    values = np.random.default_rng(seed).standard_normal((3, SIZE)) * 3
    return (np.round(values) if ties else values).astype(dtype)


@pytest.mark.parametrize("ties", [False, True], ids=["apart", "ties"])
@pytest.mark.parametrize("seed", range(3))
def test_the_likeliest_is_the_first_of_the_largest(choosers, seed, ties):
    sessions, dtype = choosers
    given = logits(seed, dtype, ties=ties)
    token, best, past = sessions[GREEDY].run(None, {"logits": given, "past": np.array([4, 0, 9])})
    assert token[:, 0].tolist() == given.argmax(axis=1).tolist()
    assert best.tolist() == given.max(axis=1).tolist()
    assert past.tolist() == [5, 1, 10]


@pytest.mark.parametrize("kind", [GREEDY, DRAW, AMONG])
@pytest.mark.parametrize("place", [3, SIZE - 1])
def test_a_logit_that_is_no_number_shows(choosers, kind, place):
    sessions, dtype = choosers
    given = logits(0, dtype, ties=False)
    given[1, place] = np.nan
    given[2, place] = -np.inf  # a token that never comes is none of these
    options = {
        "logits": given, "past": np.zeros(3, np.int64), "chance": np.zeros(3),
        **options_of([Sampling(top_k=5, top_p=0.5)] * 3, SIZE),
    }  # fmt: skip
    _, best, _ = sessions[kind].run(None, {value.name: options[value.name] for value in sessions[kind].get_inputs()})
    assert np.isfinite(best).tolist() == [True, False, True]


@pytest.mark.parametrize("ties", [False, True], ids=["apart", "ties"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.3), Sampling(1.5, 7), Sampling(0.8, None, 0.6), Sampling(2.0, 40, 0.9)]
)
def test_what_is_drawn_is_what_the_host_draws(choosers, sampling, ties):
    sessions, dtype = choosers
    for seed in range(8):
        given, chance = logits(seed, dtype, ties=ties), np.random.default_rng(seed).random(3)
        options = {
            "logits": given, "past": np.zeros(3, np.int64), "chance": chance, **options_of([sampling] * 3, SIZE),
        }  # fmt: skip
        kinds = [AMONG, *([DRAW] if sampling.top_k is None and sampling.top_p is None else [])]
        expected = [sampling.draw(row, Drawing(number)) for row, number in zip(given, chance, strict=True)]
        for kind in kinds:
            feed = {value.name: options[value.name] for value in sessions[kind].get_inputs()}
            assert sessions[kind].run(["token"], feed)[0][:, 0].tolist() == expected


@pytest.mark.parametrize("ties", [False, True], ids=["apart", "ties"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_have_options_of_their_own_and_may_take_the_likeliest(choosers, seed, ties):
    sessions, dtype = choosers
    samplings = [Sampling(1.5, 7, 0.6), None, Sampling(0.4)]
    given, chance = logits(seed, dtype, ties=ties), np.random.default_rng(seed).random(3)
    chance[1] = 0
    options = {"logits": given, "past": np.zeros(3, np.int64), "chance": chance, **options_of(samplings, SIZE)}
    token, best, _ = sessions[AMONG].run(None, options)
    drawn = [samplings[row].draw(given[row], Drawing(chance[row])) for row in (0, 2)]
    assert token[:, 0].tolist() == [drawn[0], given[1].argmax(), drawn[1]]
    assert best.tolist() == given.max(axis=1).tolist()


def test_one_file_each_is_written_for_the_logits_of_an_engine(tmp_path):
    outputs = (TensorSpec("logits", "float16", ("batch", 1, SIZE)), TensorSpec("key_out", "float16", (1, 2, 3, 4)))
    write(tmp_path, Signature((), outputs))
    assert {file.name for file in tmp_path.iterdir()} == {GREEDY, DRAW, AMONG}
    session = onnxruntime.InferenceSession(str(tmp_path / GREEDY), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(float16)"
    assert session.get_inputs()[0].shape == ["batch", SIZE]
