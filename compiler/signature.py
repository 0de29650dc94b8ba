"""What a model takes and gives: names, dtypes, shapes with dynamic axes, and how outputs nest.

Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import DataError, RecipeError

DTYPES = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float64": "float64", "double": "float64",
    "int64": "int64", "long": "int64", "int32": "int32", "int": "int32", "int16": "int16",
    "int8": "int8", "uint8": "uint8", "bool": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AxisRange:
    """The sizes that a dynamic axis may take; engines are tuned for `opt`."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise RecipeError("range of a dynamic axis is out of order", expected="1 <= min <= opt <= max", found=self)

    def __str__(self) -> str:
        return f"{self.min}..{self.opt}..{self.max}"

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.min <= size <= self.max


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output. A dimension is a size, or the name of a dynamic axis, or "?" where only running tells."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape)) or 'scalar'}:{self.dtype}"


@dataclasses.dataclass(frozen=True)
class Signature:
    """Inputs and outputs in the model's own order.

    Attributes:
        axes: range of each dynamic axis by its name; one name in two inputs means the same size in both.
        structure: how the flat outputs nest: None for a single tensor, a name for a tensor, a list or tuple
            (``{"tuple": [...]}``, ``{"list": [...]}``) or ``{"dict": {key: ...}}`` of structures, in which None
            stands for None.
        states: output that takes the place of an input in the next call, by the name of the input: the cache of a
            decoder (see states.py). Both have the same shape, and may lie in one buffer.
        positions: how many tokens a text may have, of a decoder whose caches may be shorter; None for any number.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    axes: Mapping[str, AxisRange] = dataclasses.field(default_factory=dict)
    structure: Any = None
    states: Mapping[str, str] = dataclasses.field(default_factory=dict)
    positions: int | None = None

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def sizes(self, point: str = "opt") -> dict[str, int]:
        """The size of every dynamic axis at "min", "opt" or "max"."""
        return {name: getattr(axis, point) for name, axis in self.axes.items()}

    def shapes(self, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
        """Shape of every input with the dynamic axes at `sizes` (the optimum where not given)."""
        all_sizes = {**self.sizes(), **(sizes or {})}
        return {spec.name: tuple(all_sizes[d] if isinstance(d, str) else d for d in spec.shape) for spec in self.inputs}

    @property
    def batch_axis(self) -> str | None:
        """The dynamic axis that stands first in an input, along which samples stack; None where there is none.

        Of a decoder the one of its caches: each row has one.
        """
        stacked = [spec for spec in self.inputs if spec.name in self.states] or self.inputs
        return next((s.shape[0] for s in stacked if s.shape and isinstance(s.shape[0], str)), None)

    def check(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Checks arrays against the inputs' names, dtypes and shapes, and returns the sizes of the dynamic axes.

        Anything with `shape` and `dtype` will do; the values are not read.

        Raises:
            DataError: the first thing that does not fit.
        """
        check_names([spec.name for spec in self.inputs], inputs)
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            array = inputs[spec.name]
            if (dtype := str(array.dtype).removeprefix("torch.")) != spec.dtype:
                raise DataError(f"input {spec.name!r} has the wrong dtype", expected=spec.dtype, found=dtype)
            shape = tuple(array.shape)
            if len(shape) != len(spec.shape):
                raise DataError(f"input {spec.name!r} has the wrong rank", expected=self.describe(spec), found=shape)
            for size, dim in zip(shape, spec.shape, strict=True):
                if isinstance(dim, int):
                    fits = size == dim
                else:
                    fits = size in self.axes[dim] and sizes.setdefault(dim, size) == size
                if not fits:
                    raise DataError(
                        f"input {spec.name!r} has the wrong shape", expected=self.describe(spec), found=shape
                    )
        return sizes

    def describe(self, spec: TensorSpec) -> str:
        """The shape in words a reader can check: ``(batch=1..8..64, 3, 224, 224)``."""
        dims = (f"{d}={self.axes[d]}" if isinstance(d, str) and d in self.axes else str(d) for d in spec.shape)
        return f"({', '.join(dims)})"

    def nest(self, outputs: Mapping[str, Any]) -> Any:
        """Gives flat outputs the structure that the model returns: a tensor, a tuple, a list or a dict."""
        return _nest(self.structure, outputs) if self.structure is not None else next(iter(outputs.values()))

    def to_json(self) -> dict[str, Any]:
        """A form for JSON that `from_json` reads."""
        return {
            "inputs": [dataclasses.asdict(s) for s in self.inputs],
            "outputs": [dataclasses.asdict(s) for s in self.outputs],
            "axes": {name: dataclasses.asdict(axis) for name, axis in self.axes.items()},
            "structure": self.structure,
            **({"states": dict(self.states)} if self.states else {}),
            **({"positions": self.positions} if self.positions is not None else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signature:
        """The inverse of `to_json`."""
        return cls(
            inputs=tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in value["inputs"]),
            outputs=tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in value["outputs"]),
            axes={name: AxisRange(**axis) for name, axis in value["axes"].items()},
            structure=value["structure"],
            states=value.get("states", {}),
            positions=value.get("positions"),
        )


def check_names(names: Sequence[str], inputs: Mapping[str, Any]) -> None:
    """Checks that inputs have these names and no others.

    Raises:
        DataError: the first that is missing, or too many.
    """
    if missing := [name for name in names if name not in inputs]:
        raise DataError(f"input {missing[0]!r} is missing", expected=", ".join(names), found=_join(inputs))
    if extra := [name for name in inputs if name not in names]:
        raise DataError(f"the model has no input {extra[0]!r}", expected=", ".join(names), found=_join(inputs))


def parse_inputs(inputs: Iterable[str], dynamic: Iterable[str] = ()) -> Signature:
    """A signature (inputs only) from ``name:1x3x224x224[:dtype]`` and ``name:axis=[label@]min..opt..max``.

    ``name:[1,3,224,224]`` (Polygraphy) and ``name:1,3,224,224`` (onnxslim) are understood too. Axes of the same number
    and the same range are one dynamic axis unless a label tells them apart.

    Raises:
        RecipeError: text that cannot be read, an input or axis that does not exist or is given twice.
    """
    specs: dict[str, TensorSpec] = {}
    for spec in map(_parse_input, inputs):
        if spec.name in specs:
            raise RecipeError(f"input {spec.name!r} is given twice", expected="each input once", found=spec)
        specs[spec.name] = spec
    return with_axes(specs.values(), dynamic)


def with_axes(inputs: Iterable[TensorSpec], dynamic: Iterable[str]) -> Signature:
    """A signature of these inputs, with the axes made dynamic that ``name:axis=[label@]min..opt..max`` say.

    Raises:
        RecipeError: text that cannot be read, an input or axis that does not exist, an axis that is given twice.
    """
    specs = {spec.name: spec for spec in inputs}
    axes: dict[str, AxisRange] = {}
    seen: set[tuple[str, int]] = set()
    for text in dynamic:
        match = re.fullmatch(r"(.+?):(\d+)=(?:([A-Za-z_]\w*)@)?(\d+)\.\.(\d+)(?:\.\.(\d+))?", text.replace(" ", ""))
        if not match:
            raise RecipeError(f"dynamic axis {text!r} cannot be read", expected="name:axis=min..opt..max", found=text)
        name, axis, label, low, middle, high = match.groups()
        if name not in specs or int(axis) >= len(specs[name].shape):
            raise RecipeError(
                f"dynamic axis {text!r} names no axis of an input",
                expected=", ".join(map(str, specs.values())),
            )
        if (name, int(axis)) in seen:
            raise RecipeError(f"axis {axis} of input {name!r} has two ranges", expected="one --dynamic", found=text)
        seen.add((name, int(axis)))
        bounds = AxisRange(int(low), int(middle), int(high or middle))
        symbol = label or ("batch" if axis == "0" else f"dim{axis}")
        if not label and axes.get(symbol, bounds) != bounds:
            symbol = f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}_{symbol}"
        if axes.setdefault(symbol, bounds) != bounds:
            raise RecipeError(f"dynamic axis {symbol!r} has two ranges", expected=axes[symbol], found=bounds)
        shape = list(specs[name].shape)
        shape[int(axis)] = symbol
        specs[name] = dataclasses.replace(specs[name], shape=tuple(shape))
    return Signature(inputs=tuple(specs.values()), axes=axes)


def _parse_input(text: str) -> TensorSpec:
    head, _, tail = text.strip().rpartition(":")
    dtype = "float32"
    if head and tail.lower() in DTYPES:
        dtype = DTYPES[tail.lower()]
        head, _, tail = head.rpartition(":")
    shape = tail.strip("[]").replace(",", "x").replace(" ", "").lower()
    if head and shape in ("", "scalar"):
        return _input(head, dtype, ())
    if not head or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise RecipeError(f"input {text!r} cannot be read", expected="name:1x3x224x224[:dtype]", found=text)
    sizes = tuple(int(d) for d in shape.split("x"))
    if 0 in sizes:
        raise RecipeError(f"input {text!r} is empty", expected="sizes of at least 1", found=shape)
    return _input(head, dtype, sizes)


def _input(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    spec = TensorSpec(name, dtype, shape)
    check_input_dtype(spec)
    return spec


def check_input_dtype(spec: TensorSpec) -> None:
    """Refuses bfloat16, which NumPy does not have, as the dtype of an input.

    Raises:
        RecipeError: the input is of bfloat16.
    """
    if spec.dtype == "bfloat16":
        raise RecipeError(
            f"input {spec.name!r} is of bfloat16, which arrays cannot hold",
            expected="float32, or any other dtype that NumPy has",
            found="bfloat16",
            hint="wrap the model so that it takes float32 and casts to bfloat16 itself",
        )


def _nest(structure: Any, outputs: Mapping[str, Any]) -> Any:
    if structure is None:
        return None
    if isinstance(structure, str):
        return outputs[structure]
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {key: _nest(item, outputs) for key, item in items.items()}
    nested = [_nest(item, outputs) for item in items]
    return tuple(nested) if kind == "tuple" else nested


def _join(inputs: Mapping[str, Any]) -> str:
    return ", ".join(map(str, inputs)) or "nothing"
