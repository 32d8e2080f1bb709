"""Where a run happens: every line that knows Ray, and the command.

cli.py       the command: parse, load, call one function, print one result
run.py       what the commands do, in this process or on Ray
generate.py  calibration texts from a pool of generators, on Ray Data
vllm.py      the same asked of vLLM, through Ray Data LLM
parcel.py    what travels through Ray Data
driver.py    pruning on a cluster, start to end
plan.py      layers -> shards -> workers, as a value
recovery.py  what to do when a worker is lost, as a pure function
session.py   a connection to Ray: what is there, and waiting for what is not
actors.py    the plain ShardWorker as a Ray actor
stream.py    hidden states from worker to worker, a few micro-batches at a time
progress.py  what the user sees while it runs
"""
