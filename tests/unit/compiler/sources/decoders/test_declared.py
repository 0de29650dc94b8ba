import pytest
import torch

from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.states import longest_draft
from enginesmith.errors import RecipeError, SourceError

INPUTS = ["ids:1x1:int64", "past:1:int64", "count:1:int64", "seen:1x1x8x4"]
DYNAMIC = ["ids:0=1..1..4", "ids:1=time@1..1..8", "past:0=1..1..4", "count:0=1..1..4", "seen:0=1..1..4"]


class Sums(torch.nn.Module):
    """The logits are sums of the embeddings of all tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)

    def forward(self, ids, past, count, seen):
        positions = past[:, None] + torch.arange(ids.shape[1])
        index = positions[:, None, :, None].expand(-1, 1, -1, 4)
        seen = seen.scatter(2, index, self.embedding(ids)[:, None])
        read = torch.arange(8) < (past + count)[:, None]
        return {"logits": (seen[:, 0] * read[:, :, None]).sum(1), "seen": seen}


class Several(Sums):
    """Of several tokens of each row."""

    def forward(self, ids, past, count, back, seen):
        seen = super().forward(ids, past, count, seen)["seen"]
        read = torch.arange(8) < ((past + count)[:, None] - back)[:, :, None]
        return {"logits": (seen * read[..., None]).sum(2), "seen": seen}


class Nothing(Sums):
    def forward(self, ids, past, count):
        return {"logits": self.embedding(ids).sum(1) + past[:, None] + count[:, None]}


class Forgetful(Sums):
    def forward(self, ids, past, count, seen):
        outputs = super().forward(ids, past, count, seen)
        return {"logits": outputs["logits"], "other": outputs["seen"]}


class Growing(Sums):
    def forward(self, ids, past, count, seen):
        outputs = super().forward(ids, past, count, seen)
        return {"logits": outputs["logits"], "seen": torch.cat([outputs["seen"], seen], 2)}


class Unnamed(Sums):
    def forward(self, ids, past, count, seen):
        return tuple(super().forward(ids, past, count, seen).values())


def load(module, inputs=INPUTS, dynamic=DYNAMIC):
    return load_model(module, inputs=parse_inputs(inputs, dynamic), decoder={"batch": 4})


def test_caches_are_paired_by_name():
    model = load(Sums())
    assert model.signature.states == {"seen": "seen_out"}
    assert not load_model(Sums(), inputs=parse_inputs(INPUTS, DYNAMIC)).signature.states  # only where it is asked for


BACK, KEPT = ["back:1:int64"], ["back:0=kept@1..1..5"]


def test_a_decoder_may_look_back():
    model = load(Several(), [*INPUTS, *BACK], [*DYNAMIC, *KEPT])
    assert model.signature.states == {"seen": "seen_out"}
    assert longest_draft(model.signature) == 4
    assert str(model.signature.outputs[0]) == "logits:batchxkeptx4:float32"


@pytest.mark.parametrize(
    ("back", "dynamic", "found"),
    [
        ("back:5:int64", [], r"int64 \(5\)"),
        ("back:1:int32", KEPT, r"int32 \(kept=1\.\.1\.\.5\)"),
        ("back:2:int64", ["back:0=kept@2..2..5"], r"int64 \(kept=2\.\.2\.\.5\)"),
        ("back:1x1:int64", ["back:0=kept@1..1..5"], "int64 "),
    ],
)
def test_another_way_of_looking_back_is_refused(back, dynamic, found):
    with pytest.raises(RecipeError, match=rf"(?s)input 'back' of the decoder is of another kind.*found: {found}"):
        load(Several(), [*INPUTS, back], [*DYNAMIC, *dynamic])


def test_logits_of_another_shape_are_refused():
    class Last(Several):
        def forward(self, ids, past, count, back, seen):
            outputs = super().forward(ids, past, count, back, seen)
            return {**outputs, "logits": outputs["logits"][:, 0]}

    expected = r"\(batch, kept, vocabulary\).*found: \(batch=1..1..4, 4\)"
    with pytest.raises(SourceError, match=rf"(?s)the logits of the decoder have the wrong shape.*{expected}"):
        load(Last(), [*INPUTS, *BACK], [*DYNAMIC, *KEPT])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Forgetful(), r"(?s)cache 'seen' does not come back.*'seen', or seen_out.*found: logits, other"),
        (Growing(), r"(?s)cache 'seen' comes back as something else.*seen:batchx1x8x4.*found: seen_out:batchx1x16x4"),
        (Unnamed(), r"(?s)the decoder gives no logits.*found: output.0, output.1"),
    ],
)
def test_caches_that_do_not_come_back_are_refused(module, message):
    with pytest.raises(SourceError, match=message):
        load(module)


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(SourceError, match=r"(?s)the model has no cache.*leave --decoder out"):
        load(Nothing(), INPUTS[:3], DYNAMIC[:4])


def test_a_cache_of_three_axes_is_refused():
    class Flat(Sums):
        def forward(self, ids, past, count, seen):
            outputs = super().forward(ids, past, count, seen[:, None])
            return {"logits": outputs["logits"], "seen": outputs["seen"][:, 0]}

    with pytest.raises(SourceError, match=r"(?s)cache 'seen' has the wrong shape.*\(batch, heads, max_length, width\)"):
        load(Flat(), [*INPUTS[:3], "seen:1x8x4"])


def test_calls_of_another_form_are_refused():
    class Other(Sums):
        def forward(self, ids, past, number, seen):
            return super().forward(ids, past, number, seen)

    with pytest.raises(
        RecipeError, match=r"(?s)a decoder takes 'count', which is not among the inputs.*--input count:1:int64"
    ):
        load(Other(), [*INPUTS[:2], "number:1:int64", INPUTS[3]], [d.replace("count", "number") for d in DYNAMIC])
    with pytest.raises(RecipeError, match=r"(?s)input 'past' of the decoder is of another kind.*\(batch\) of int64"):
        load(Sums(), [INPUTS[0], "past:1:int32", *INPUTS[2:]])


def test_other_models_have_no_decoder(tmp_path):
    script = torch.jit.script(torch.nn.Linear(2, 2))
    with pytest.raises(RecipeError, match=r"(?s)--decoder does not go with a ScriptModule, a model without a cache"):
        load_model(script, inputs=parse_inputs(["input:1x2"]), decoder={"batch": 2})
    script.save(tmp_path / "model.pt")
    with pytest.raises(RecipeError, match=r"--decoder does not go with model\.pt"):
        load_model(tmp_path / "model.pt", inputs=parse_inputs(["input:1x2"]), decoder={"batch": 2})
