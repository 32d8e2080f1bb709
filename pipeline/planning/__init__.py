"""What a run will cost, before it begins.

scope.py     what is known of it then: shapes, counts, sizes
cost.py      floating-point operations and bytes, by count
memory.py    what a worker holds at its widest moment
disk.py      the bytes that are written, and whether there is room for them
rates.py     how fast a machine is, from a file or assumed
gauge.py     measured by a smoke run of one layer
solving.py   its part: how fast a method takes the groups of a layer
stopwatch.py how long something takes
"""
