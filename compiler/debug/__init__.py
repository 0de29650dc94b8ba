"""Where two graphs or engines part: intermediate values compared in chunks."""
