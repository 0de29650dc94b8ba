"""What pruning takes from the torch module that a graph was captured from, and gives back to it.

`gradients_of` gives the pass gradients; `hand_back` writes the weights that are left as a state_dict of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import RecipeError
from ....passes.base import Kept
from ...manifest import PassRecord
from ...recipe import Recipe

if TYPE_CHECKING:
    import numpy as np

    from ...calibration import Calibration
    from ...graph import Graph
    from ...sources import Model

FOLDER = "pruned"
"""Folder of a bundle that holds weights, one folder for each engine."""


def check_pruned_weights(recipe: Recipe) -> None:
    """Fails early where weights of pruned engines are to be written, and there will be none.

    Raises:
        RecipeError: the recipe prunes nothing.
    """
    if recipe.pruned_weights and recipe.prune is None:
        raise RecipeError(
            "pruned_weights writes the weights of pruned engines, and the recipe asks for none",
            hint="add --prune, for instance --prune 0.3",
        )


def check_module(recipe: Recipe, model: Model) -> None:
    """Fails early where there is no torch module whose state_dict could be written.

    Raises:
        RecipeError: the model is a file of a graph or of a program.
    """
    if recipe.pruned_weights and model.kind != "module":
        raise RecipeError(
            "pruned weights are a state_dict, and there is no torch module that could load it",
            expected="a model from file.py:factory, or a torch module",
            found=f"{recipe.model}, of kind {model.kind}",
            hint="leave out --pruned-weights",
        )


def gradients_of(
    model: Model, calibration: Calibration | None, seed: int
) -> Callable[[Graph], Iterable[Mapping[str, np.ndarray]]] | None:
    """What takes gradients of a graph's weights; None where no module runs in Python, or there are no data."""
    if model.kind not in ("module", "exported-program") or model.module is None or calibration is None:
        return None
    from ...sources.flat import FlatModule
    from .gradients import gradients

    module, samples, signature = model.module, calibration.limited(), model.signature
    assert isinstance(module, FlatModule)
    return lambda graph: gradients(graph, module, signature, samples, seed=seed)


def hand_back(
    bundle: Path,
    model: Model,
    sample: Mapping[str, np.ndarray],
    graphs: tuple[Graph, Graph],
    record: PassRecord,
    kept: Kept,
) -> None:
    """Writes the weights that are left as a state_dict, or notes in the pass's record why that cannot be.

    Args:
        bundle: folder to write into.
        sample: inputs to run the module on.
        graphs: before and after the pass.
        record: of the pass; its details tell the folder, or the reasons.
        kept: of the result of the pass.
    """
    from ...sources.flat import FlatModule
    from .state_dict import pruned_state, write_state

    assert isinstance(model.module, FlatModule)
    state = pruned_state(*graphs, kept, model.module, model.signature, sample)
    folder = None if state.refusals else f"{FOLDER}/{record['engines'][0]}"
    if folder is not None:
        write_state(bundle / folder, state, record["engines"], record["text"])
    reasons = [f"{refusal.node}: {refusal.reason}" for refusal in state.refusals]
    record["details"]["pruned_weights"] = {"folder": folder, "reasons": reasons}
