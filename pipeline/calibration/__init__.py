"""Calibration data: windows of token ids of one length, from any source.

sources.py     the registry of sources; one file each:
text.py          plain text files
parquet.py       token ids or text in Parquet files, also ready windows
dataset.py       anything `datasets` can stream, from the hub or a folder
mix.py           several sources by weight
selfgen.py       text that the model writes itself
plan.py        what a source will give, checked and read before anything is written    config -> parts
generation.py    the texts to be generated: prompts, batches, which are still missing
generator.py       the model that writes them, batch by batch                          batches -> rows
sampling.py        how a token is drawn, each row from random numbers of its own
rows.py            generated texts on disk, so that a killed stage goes on
filters.py         which of them are kept                                              rows -> documents
windows.py     documents -> windows, inside documents or across them
summary.py     what came out: counts, quantiles, overlap, a plot
"""
