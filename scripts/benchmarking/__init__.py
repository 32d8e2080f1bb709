"""The benchmark behind scripts/benchmark.py, which imports no torch: what subjects share in memory would count as half.

contest.py  table.py    rounds of all subjects on one model, and what is made of them
conditions.py           what is the same for all subjects, and who they are
measurement.py          a process seen from outside: seconds, CPU seconds, memory
subject.py              what every subject is told, and how it tells what it took
run_shardprune.py  run_textbook.py  run_llmcompressor.py      the subjects, each a process of its own
textbook.py             SparseGPT and Wanda as their papers run them
peer.py                 the environment of llm-compressor, from llmcompressor-pins.txt
rate.py  floor.py  agreement.py      what the machine can, what is necessary, whether all did the same
growth.py  profile_stages.py         the ways --growth and --profile
stages.py               where the time of a run goes, seen from inside
device_floor.py         the least that a layer takes on a GPU, for measure_layer.py
"""
