"""The draft of a language model that is served: which engine it is, whether the served one can check it, its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..compiler.engine import engine_info, read_manifest
from ..compiler.generation.generate import check_decoder
from ..compiler.generation.speculative import check_draft
from ..compiler.manifest import EngineRecord, Manifest
from ..compiler.signature import Signature
from .settings import Serving


@dataclasses.dataclass(frozen=True)
class Draft:
    """An engine of a bundle, which may be the served one's."""

    bundle: Path
    manifest: Manifest
    record: EngineRecord

    def check(self, served: Signature) -> None:
        """Whether a served engine can check what this one proposes.

        Raises:
            EngineError: it has no cache.
            EngineMismatchError: the served engine checks no drafts, or the vocabularies differ.
        """
        signature = engine_info(self.bundle, self.record["name"]).signature
        check_decoder(signature)
        check_draft(served, 1, signature, None, do_sample=False)


def of_draft(settings: Serving) -> tuple[Path, Manifest, Serving] | None:
    """The bundle of the draft, and the settings that name its engine; None where there is none.

    Raises:
        UsageError: it is no bundle.
    """
    if settings.draft is None:
        return None
    bundle = Path(settings.draft)
    return bundle, read_manifest(bundle), dataclasses.replace(settings, engine=settings.draft_engine)
