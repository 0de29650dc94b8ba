"""Decoders of TorchInductor: exported programs, which torch runs here as they are, and generation with them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import transformers
from safetensors.torch import save_file

from enginesmith.compiler.data import random_batch
from enginesmith.compiler.engine import Engine
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Request
from enginesmith.compiler.generation.eviction import Eviction
from enginesmith.compiler.generation.prefixes import Prefixes
from enginesmith.compiler.generation.steps import Choosing, Finding, Stepping, steps_of
from enginesmith.compiler.signature import AxisRange
from enginesmith.compiler.sources import Model, load_model
from enginesmith.compiler.states import empty_caches
from enginesmith.errors import BuildError, DataError, EngineError
from enginesmith.targets._torch import check
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.inductor import decoders, decoding, steps
from enginesmith.targets.inductor.decoders import ANY, MANY, ONE

random = runpy.run_path(str(Path(__file__).parents[3] / "random_model.py"))["random"]

LENGTH, BATCH, VOCABULARY = 32, 3, 61
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8, 2]]
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}


def gpt2():
    config = transformers.GPT2Config(**SIZES, n_positions=2 * LENGTH, n_embd=24, n_layer=2, n_head=2)
    model = random(functools.partial(transformers.GPT2LMHeadModel, config))
    for parameter in (value for key, value in model.named_parameters() if key.endswith("bias")):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def llama():
    config = transformers.LlamaConfig(
        **SIZES, max_position_embeddings=LENGTH, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return random(functools.partial(transformers.LlamaForCausalLM, config))


class Program:
    """An exported program in the place of a compiled one."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._run = program.module()
        self.names = [*program.state_dict, *program.constants]

    def constants(self):
        return self.names

    def refer_to(self, given):
        own = {**self._program.constants, **self._program.state_dict}
        assert all(torch.equal(given[name], own[name]) for name in self.names)

    def __call__(self, *tensors):
        return self._run(*tensors)


def request(model, folder, precision="fp32"):
    signature = decoders.stored(model.signature, precision)
    sizes = {name: axis.opt for name, axis in signature.axes.items()}
    sample = {
        spec.name: (np.ones if spec.dtype == "int64" else np.zeros)(signature.shapes(sizes)[spec.name], np.float32)
        for spec in signature.inputs
    }
    sample = {spec.name: sample[spec.name].astype(spec.dtype) for spec in signature.inputs}
    return BuildRequest(None, model, signature, precision, sample, folder, folder, print)


@dataclasses.dataclass(frozen=True)
class Made:
    """A model with its programs in a folder, which torch runs as they are."""

    model: transformers.PreTrainedModel
    loaded: Model
    info: EngineInfo
    programs: dict[str, torch.export.ExportedProgram]
    folder: Path

    def runner(self):
        """The programs, opened."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "Package", self._load)
            return decoding.DecodingRunner(self.folder, self.info, "cpu")

    def _load(self, file, single_threaded, device_index):
        assert single_threaded
        assert device_index == -1
        return Program(self.programs[Path(file).stem])


def made(model, folder, *, kernels=True, precision="fp32", **decoder):
    """Exports the programs of a model."""
    loaded = load_model(model, decoder={"max_length": LENGTH, **decoder})
    asked = request(loaded, folder, precision)
    programs = dict(decoders.export(asked, "cpu", kernels=kernels))
    decoders.saved(programs, folder)
    for name in programs:
        (folder / f"{name}.pt2").touch()
    info = EngineInfo("engine", "torch-inductor", precision, "any.pt2", asked.signature)
    return Made(model, loaded, info, programs, folder)


def opened(made):
    """The engine of a model."""
    return Engine(made.info, made.runner())


@pytest.fixture(
    scope="module",
    params=[(gpt2, False), (gpt2, True), (llama, True)],
    ids=["gpt2 of torch's operators", "gpt2", "llama"],
)
def decoder(request, tmp_path_factory):
    model, kernels = request.param
    return made(model(), tmp_path_factory.mktemp("engine"), kernels=kernels, batch=BATCH), kernels


@pytest.fixture(scope="module")
def engine(decoder):
    with opened(decoder[0]) as engine:
        yield engine


def greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


def test_it_is_one_for_generation(engine):
    runner = engine._open_runner()
    assert isinstance(runner, Stepping)
    assert isinstance(steps_of(runner, engine.signature, 1), Choosing)


def test_tokens_are_those_of_transformers(decoder, engine):
    model = decoder[0].model
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    assert engine.generate(PROMPTS, 20) == expected
    assert engine.generate(PROMPTS, 20) == expected  # on calls that were made before
    assert [engine.generate(prompt, 20)[0] for prompt in PROMPTS] == expected
    assert engine.generate(PROMPTS[1], LENGTH - 1)[0][:20] == expected[1]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.5, "temperature": 3.0}], ids=str
)
def test_what_is_drawn_is_what_the_host_draws(engine, monkeypatch, options):
    given = {"do_sample": True, "seed": 5, **options}
    found = engine.generate(PROMPTS, 8, **given)
    assert found != engine.generate(PROMPTS, 8)
    monkeypatch.setattr("enginesmith.compiler.generation.following.Choosing", type("Nothing", (), {}))
    assert engine.generate(PROMPTS, 8, **given) == found


def test_calls_of_one_token_are_of_few_operators(decoder):
    made, kernels = decoder
    assert set(made.programs) == {ONE, MANY, ANY}
    for name, program in made.programs.items():
        found = [str(node.target) for node in program.graph.nodes]
        own = kernels and name != ANY
        assert ("enginesmith.attend.default" in found) == own
        assert ("aten.softmax.int" in found) != own
        assert ("enginesmith.largest.default" in found) == own
        entries = {node.args[5] for node in program.graph.nodes if str(node.target) == "enginesmith.attend.default"}
        assert [str(node.target) for node in entries] == ["aten.as_strided.default"] * own  # found once, in memory


def test_rows_are_computed_as_one_by_one(engine):
    runner = engine._open_runner()
    caches = runner.empty_caches(BATCH)
    steps = steps_of(runner, engine.signature, BATCH, caches)
    ids, counts = np.zeros((BATCH, 8), np.int64), np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    steps(ids, np.zeros(BATCH, np.int64), counts)
    found = steps(np.full((BATCH, 1), 5), counts, np.ones(BATCH, np.int64))
    for row, prompt in enumerate(PROMPTS):
        own = steps_of(runner, engine.signature, 1, {name: cache[row : row + 1] for name, cache in caches.items()})
        again = own(np.array([[5]]), np.array([len(prompt)]), np.array([1]))
        np.testing.assert_allclose(again[0], found[row], atol=1e-4)
        whole = steps_of(runner, engine.signature, 1)(np.array([[*prompt, 5]]), np.zeros(1, int), counts[row:][:1] + 1)
        np.testing.assert_allclose(whole[0], found[row], atol=1e-4)


def test_the_batcher_moves_rows(decoder, engine):
    model = decoder[0].model
    known = Prefixes(1 << 20)
    long = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    asked = [(PROMPTS[0], 8), (PROMPTS[1], 3), (PROMPTS[2], 6), (long, 5), ([*long, 3], 4)]
    batcher = engine.batcher(prefixes=known)
    requests = [
        Request(np.array(prompt), count, Choice(None), (), [].append, lambda error: None) for prompt, count in asked
    ]
    for one in requests:
        batcher.submit(one)
    batcher.close()
    for (prompt, count), one in zip(asked, requests, strict=True):
        assert one.take.__self__ == greedy(model, prompt, count)
    assert known.reused >= 9


def test_generations_share_caches_unless_they_run_at_a_time(engine):
    runner = engine._open_runner()
    engine.generate(PROMPTS, 2)
    first = steps_of(runner, engine.signature, 2)
    kept = first._calls
    assert kept._caches["key.0"].data_ptr() == runner._shared["key.0"].data_ptr()
    assert not any(cache.any() for cache in kept._caches.values())
    other = steps_of(runner, engine.signature, 2)
    assert other._calls is not kept
    del other
    assert steps_of(runner, engine.signature, 2)._calls is not kept
    del first
    assert steps_of(runner, engine.signature, 2)._calls is kept


def test_a_call_leaves_the_given_caches(engine):
    given = {
        "ids": np.array([[5]]), "past": np.array([4]), "count": np.array([1]),
        **{name: np.ones_like(cache) for name, cache in empty_caches(engine.signature, 1).items()},
    }  # fmt: skip
    runner = engine._open_runner()
    outputs, bound = runner.run(given), runner.bind(given)
    assert all((given[name] == 1).all() for name in engine.signature.states)
    for _ in range(2):
        bound.run()
    assert len(bound.timed(2)[0]) == 2
    again = bound.outputs()
    for name, output in engine.signature.states.items():
        written = outputs[output] != given[name]
        assert written[:, :, 4].any()
        assert not np.delete(written, 4, axis=2).any()
        np.testing.assert_array_equal(again[output], outputs[output])
    np.testing.assert_allclose(again["logits"], outputs["logits"], atol=1e-6)
    as_tensors = runner.run({name: torch.from_numpy(array) for name, array in given.items()})
    np.testing.assert_allclose(as_tensors["logits"].numpy(), outputs["logits"], atol=1e-6)
    with pytest.raises(DataError, match="input 'ids' has the wrong rank"):
        runner.run({**given, "ids": np.array([5])})


def test_logits_that_are_no_numbers_are_told(engine, monkeypatch):
    runner = engine._open_runner()
    launch = runner.launch

    def broken(given):
        logits, *rest = launch(given)
        return (logits, rest[0].fill_(torch.nan), rest[1]) if rest else (logits,)

    monkeypatch.setattr(runner, "launch", broken)
    with pytest.raises(EngineError, match="gives logits that are no numbers, for row 0 at token 2"):
        engine.generate(PROMPTS[:2], 3)


def test_caches_are_cut_and_copied_like_arrays(engine):
    cache = engine._open_runner().empty_caches(3)["key.0"]
    array = np.asarray(cache).copy()
    heads, room, width = cache.shape[1:]
    assert (cache.nbytes, cache.dtype) == (array.nbytes, array.dtype)
    numbers = np.random.default_rng(0).standard_normal((heads, 5, width)).astype(array.dtype)
    for made in (cache, array):
        made[1, :, :5] = numbers
        made[0, :, :3] = made[1, :, :3]
        made[1:3][1:][:, :, :4] = made[:1][:, :, :4]
    assert np.array_equal(np.asarray(cache), array)
    copied = cache[:2, :, :6].copy()
    cache[:2, :, :6] = np.zeros((2, heads, 6, width), np.float32)
    assert np.array_equal(np.asarray(copied), array[:2, :, :6])
    assert np.asarray(cache[2], dtype=np.float64).shape == (heads, room, width)


def test_a_closed_engine_says_so(decoder):
    runner = decoder[0].runner()
    steps = steps_of(runner, decoder[0].info.signature, 1)
    runner.close()
    with pytest.raises(EngineError, match=r"engine engine is closed\n.*load it again"):
        steps(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), np.ones(1, np.int64))


def test_closing_frees_the_weights_that_others_refer_to(decoder, monkeypatch):
    found = {}

    def tensors(folder, device):
        found.update({name: tensor.clone() for name, tensor in decoders.tensors(folder, device).items()})
        return dict(found)

    monkeypatch.setattr(decoding, "tensors", tensors)
    runner = decoder[0].runner()
    assert all(tensor.untyped_storage().nbytes() for tensor in found.values())
    runner.close()
    assert found
    assert not any(tensor.untyped_storage().nbytes() for tensor in found.values())
    runner.close()


def test_an_engine_stays_on_the_gpu_that_was_current_when_it_was_loaded(decoder, monkeypatch):
    made, asked = decoder[0], []

    def load(file, single_threaded, device_index):
        asked.append(device_index)
        return Program(made.programs[Path(file).stem])

    def entered(device):
        asked.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(decoding, "Package", load)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    monkeypatch.setattr(decoding, "tensors", lambda folder, device: decoders.tensors(folder, "cpu"))
    runner = decoding.DecodingRunner(made.folder, made.info, "cuda")
    assert runner.device == "cuda:1"
    with runner.turn():
        assert asked == [1, 1, 1, "cuda:1"]
    runner.close()
    assert asked[-1] == "cuda:1"


def test_calls_that_the_engine_does_not_take_are_refused(tmp_path):
    runner = made(gpt2(), tmp_path, batch=1).runner()
    signature = runner.signature
    one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
    steps = steps_of(runner, signature, 1)
    steps(np.zeros((1, 2), np.int64), none, one)
    with pytest.raises(DataError, match="input 'ids' has the wrong shape"):
        steps(np.zeros((1, LENGTH + 1), np.int64), none, one)
    with pytest.raises(DataError, match="input 'past' has the wrong dtype"):
        steps(np.zeros((1, 2), np.int64), none.astype(np.int32), one)
    with pytest.raises(DataError, match="input 'count' has the wrong rank"):
        steps.likeliest(np.zeros((1, 2), np.int64), none, one[0])
    two = steps_of(runner, signature, 2)
    for call in (
        lambda: two(np.zeros((2, 1), np.int64), np.zeros(2, np.int64), np.ones(2, np.int64)),
        lambda: two.token(np.zeros(2, np.int64), np.zeros(2, np.int64), [None] * 2, np.zeros(2)),
    ):
        with pytest.raises(DataError, match="input 'ids' has the wrong shape"):
            call()


def test_rows_of_caches_begin_where_programs_for_a_gpu_write():
    caches = torch.zeros(3, 1, 30, 1)
    assert caches.data_ptr() % 64 == 0
    steps.check_places({"importance.0": caches, "key.0": torch.zeros(3, 1, 32, 1)[2:]})
    with pytest.raises(
        EngineError,
        match=r"(?s)cache 'importance.0' of a row does not begin at a multiple of 16 bytes.*"
        r"found.* rows of 120 bytes.*a multiple of 8",
    ):
        steps.check_places({"importance.0": caches[1:]})


def test_what_is_timed_is_captured_where_generation_does(engine, monkeypatch):
    runner, asked = engine._open_runner(), []

    class Graphs:
        def captured(self, call, *, apart):
            asked.append(apart)
            return call

    monkeypatch.setattr(runner, "on_gpu", True)
    monkeypatch.setattr(runner, "_graphs", Graphs())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for length, expected in ((1, [True]), (2, [True])):
        call = random_batch(engine.signature, np.random.default_rng(0), {"time": length})
        bound = runner.bind(call)
        bound.run()
        bound.run()
        assert asked == expected
        np.testing.assert_allclose(bound.outputs()["logits"], runner.run(call)["logits"], atol=1e-5)


def test_weights_are_saved_once_and_a_missing_one_is_told(decoder, monkeypatch):
    made = decoder[0]
    numbers = sum(parameter.numel() for parameter in made.model.parameters())  # the head of GPT-2 is its embedding
    assert 4 * numbers < (made.folder / decoders.WEIGHTS).stat().st_size < 4 * numbers + 20_000
    monkeypatch.setattr(Program, "constants", lambda self: ["other"])
    with pytest.raises(EngineError, match=r"engine engine has no weight 'other'\n.*compile it again"):
        made.runner()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_traced_as_they_are_stored(tmp_path, precision):
    model = llama()
    head = model.lm_head.weight
    head.data = head.data.T.contiguous().T
    turned = made(model, tmp_path, precision=precision, batch=1)
    assert all(weight.is_contiguous() for program in turned.programs.values() for weight in program.state_dict.values())
    assert model.lm_head.weight is head
    assert not head.is_contiguous()


def test_constants_on_the_host_stay_there(tmp_path, monkeypatch):
    constants = {"a": torch.ones(2), "b": torch.zeros(3)}
    decoders.saved({ONE: types.SimpleNamespace(constants=constants, state_dict={})}, tmp_path)
    opened = safetensors.safe_open
    with opened(tmp_path / decoders.WEIGHTS, framework="pt") as file:
        kept = file.metadata()
    assert json.loads(kept["on_host"]) == ["one/a", "one/b"]
    save_file(
        dict(constants),
        tmp_path / decoders.WEIGHTS,
        metadata={**kept, "names": '{"a": "a", "b": "b"}', "on_host": '["b"]'},
    )
    asked = []

    class Noted:
        def __init__(self, path, framework, device):
            self._device, self._file = device, opened(path, framework=framework)
            self.metadata, self.keys = self._file.metadata, self._file.keys

        def __enter__(self):
            return self

        def __exit__(self, *_):
            """Nothing to close."""

        def get_tensor(self, key):
            asked.append((key, self._device))
            return self._file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Noted)
    assert {key: tensor.tolist() for key, tensor in decoders.tensors(tmp_path, "cuda:1").items()} == {
        key: tensor.tolist() for key, tensor in constants.items()
    }
    assert sorted(asked) == [("a", "cuda:1"), ("b", "cpu")]


def test_a_model_without_a_module_is_refused(decoder, tmp_path):
    asked = request(decoder[0].loaded, tmp_path)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, kind="onnx", module=None))
    with pytest.raises(BuildError, match=r"a model of kind 'onnx' holds no torch module\n.*onnxruntime-cpu"):
        list(decoders.export(asked, "cpu", kernels=False))


def test_caches_are_in_float16_in_that_precision(tmp_path):
    half = made(gpt2(), tmp_path, precision="fp16")
    assert {half.info.signature.input(name).dtype for name in half.info.signature.states} == {"float16"}
    floats = empty_caches(half.loaded.signature, 1)
    call = {"ids": np.array([[5, 6]]), "past": np.array([0]), "count": np.array([2]), **floats}
    found, expected = half.runner().run(call), half.loaded.reference.run(call)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, atol=2e-2)
    assert opened(half).generate([3, 1, 4], 3)[0] == greedy(half.model, [3, 1, 4], 3)
    assert next(half.loaded.module.parameters()).dtype is torch.float32


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_frequencies_of_rotary_embeddings_stay_in_float32(tmp_path, precision):
    length = 4096
    config = transformers.LlamaConfig(
        **SIZES, max_position_embeddings=length, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = random(functools.partial(transformers.LlamaForCausalLM, config), deviation=0.1)
    long = made(model, tmp_path, precision=precision, max_length=length, batch=1)
    caches = random_batch(long.loaded.signature, np.random.default_rng(0), {"time": 1})
    call = {**caches, "ids": np.array([[5]]), "past": np.array([length - 6]), "count": np.array([1])}
    found, expected = long.runner().run(call), long.loaded.reference.run(call)
    written = [outputs["key.0_out"][:, :, length - 6] for outputs in (found, expected)]
    np.testing.assert_allclose(*written, atol=1e-2 * np.abs(written[1]).max())
    assert {buffer.dtype for _, buffer in model.named_buffers() if buffer.is_floating_point()} == {torch.float32}


def test_what_was_built_is_called_with_one_token_of_rows_that_differ(decoder, engine):
    made, seen = decoder[0], []
    asked = request(made.loaded, made.folder)

    class Mixed:
        mixed = False

        def reset(self):
            """No state."""

        def run(self, inputs):
            seen.append(inputs["ids"].shape)
            outputs = engine._open_runner().run(inputs)
            mixed = self.mixed and inputs["ids"].shape[1] == 1
            return {name: array[::-1] for name, array in outputs.items()} if mixed else outputs

    runner = Mixed()
    check(runner, asked, "compiled")
    assert seen == [(1, 1), (BATCH, LENGTH), (2, 1), (1, 2)]
    runner.mixed = True
    with pytest.raises(BuildError, match="the compiled module does not do what the model does at batch=2, time=1"):
        check(runner, asked, "compiled")


@pytest.mark.parametrize("policy", ["window", "importance"])
def test_tokens_are_dropped_from_full_caches(tmp_path, policy):
    small = made(gpt2(), tmp_path, max_length=12, eviction=policy, batch=1)
    engine, plain = opened(small), Engine(small.info, small.loaded.reference)
    eviction = Eviction(policy)
    assert engine.generate([3, 1, 4], 24, eviction=eviction) == plain.generate([3, 1, 4], 24, eviction=eviction)
    assert engine.generate([3, 1, 4], 6) == plain.generate([3, 1, 4], 6)


def test_drafts_are_checked(tmp_path):
    engine = opened(made(gpt2(), tmp_path, speculative_tokens=3, batch=1))
    assert isinstance(steps_of(engine._open_runner(), engine.signature, 1), Finding)
    assert engine.generate([3, 1, 4], 12, draft=engine) == engine.generate([3, 1, 4], 12)


BATCHES = {"batch": AxisRange(1, 1, 8), "time": AxisRange(1, 1, 32)}
STEP = {"time": AxisRange(1, 1, 1)}


def test_programs_are_for_the_sizes_of_the_axes():
    wide = load_model(gpt2(), decoder={"max_length": 32, "batch": 8}).signature
    assert decoders.ranges(wide) == {
        ANY: BATCHES,
        ONE: {**STEP, "batch": AxisRange(1, 1, 1)},
        MANY: {**STEP, "batch": AxisRange(2, 2, 8)},
    }
    single = load_model(gpt2(), decoder={"max_length": 32, "batch": 1}).signature
    assert decoders.ranges(single) == {ONE: STEP, ANY: {"time": AxisRange(1, 1, 32)}}


@pytest.mark.parametrize(
    ("names", "call", "expected"),
    [
        ((ONE, MANY, ANY), (1, 1, 1), ONE),
        ((ONE, MANY, ANY), (5, 1, 1), MANY),
        ((ONE, MANY, ANY), (5, 2, 1), ANY),
        ((ONE, MANY, ANY), (1, 1, 2), ANY),
        ((ONE, ANY), (2, 1, 1), ANY),
    ],
)
def test_a_call_goes_to_the_program_that_takes_it(names, call, expected):
    assert decoders.program_for(names, *call) == expected
