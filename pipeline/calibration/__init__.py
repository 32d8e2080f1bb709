"""Calibration data: a source gives token ids, `windows.py` cuts them into windows of one length.

One file per source; the union in `sources.py` is the registry.
"""
