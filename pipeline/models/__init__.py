"""Models: `checkpoint.py` knows tensors by checkpoint key, `tensor_file.py` reads them, `skeleton.py` runs one decoder
layer at a time."""
