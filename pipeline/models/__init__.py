"""Models: `checkpoint.py` reads tensors by checkpoint key, `skeleton.py` runs one decoder layer at a time."""
