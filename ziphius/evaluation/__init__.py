"""How good a model is: bits per byte, and the plain baselines it must beat."""
