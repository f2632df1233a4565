"""How fast the attention is, and a training step with it, against the best dense one in the same process."""
