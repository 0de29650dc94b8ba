"""The pass that an option of a recipe asks for."""

AUTO = "auto"
"""With the pass' own choice of a kind."""


def pass_text(asked: str) -> str:
    """The pass with its options as text, for ``auto`` or ``option=value,...``."""
    return "sparse-attention" if asked == AUTO else f"sparse-attention:{asked}"
