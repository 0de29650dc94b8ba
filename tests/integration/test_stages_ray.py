"""Stages as actors of Ray, where it is installed: the extra `[ray]` is too large for the tests that all run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import enginesmith
from enginesmith.errors import DataError, EngineError, UsageError

pytest.importorskip("ray.dag", reason="needs the extra [ray]")

from enginesmith.targets.stages.on_ray import RayPipeline

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    made = enginesmith.compile(
        recipe=ROOT / "samples/digits/recipe.yaml",
        output=folder / "bundle",
        targets=["onnxruntime-cpu", "pipeline:stages=2,micro_batch=3"],
        precisions=["fp32"],
        benchmark=False,
    )
    return made.path


@pytest.fixture(scope="module")
def pipeline(bundle):
    with RayPipeline(bundle) as made:
        yield made


def images(count: int) -> dict[str, np.ndarray]:
    return {"image": np.load(ROOT / "samples/digits/test.npz")["image"][:count]}


@pytest.mark.parametrize("batch", [64, 1, 7])
def test_actors_give_what_the_engine_gives(bundle, pipeline, batch):
    with enginesmith.load(bundle, "pipeline-fp32") as engine:
        expected = engine.run(images(batch))
    found = pipeline.run(images(batch))
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_earlier_outputs_stay_when_others_come(pipeline):
    first = pipeline.run(images(3))
    kept = {name: array.copy() for name, array in first.items()}
    pipeline.run({"image": images(9)["image"][6:]})
    for name, array in kept.items():
        np.testing.assert_array_equal(first[name], array)


def test_inputs_that_do_not_fit(pipeline):
    with pytest.raises(DataError, match="input 'image' has the wrong shape"):
        pipeline.run({"image": np.zeros((4, 1, 9, 9), np.float32)})
    assert len(pipeline.run(images(4))) > 0


def test_engines_and_resources_that_do_not_fit(bundle):
    with pytest.raises(UsageError, match="has no such engine of stages"):
        RayPipeline(bundle, "onnxruntime-cpu-fp32")
    with pytest.raises(UsageError, match="resources do not fit the stages"):
        RayPipeline(bundle, resources=[{"num_cpus": 1}] * 3)


def test_an_actor_that_dies_is_told_and_another_pipeline_can_be_made(bundle, pipeline):
    import ray

    with RayPipeline(bundle, resources=[{"num_cpus": 0}]) as other:
        ray.kill(other._actors[1])
        with pytest.raises(EngineError, match="a stage failed in Ray"):
            other.run(images(9))
    again = RayPipeline(bundle, resources=[{"num_cpus": 0}])
    assert len(again.run(images(9))) > 0
    again.close()
    with pytest.raises(EngineError, match="the pipeline is closed"):
        again.run(images(1))
