"""Which nodes cost the accuracy: the error that each causes alone, and the choice that keeps a budget."""
