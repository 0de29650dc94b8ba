"""How fast is a service? Load of known shape, and what came of it."""
