"""Tensors in, tensors out: statistics, exact-count masks, orders of columns, and the solver. Imports torch only."""
