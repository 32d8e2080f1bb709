"""Tensors in, tensors out: statistics of the inputs, exact-count masks, and the solver. Imports torch only."""
