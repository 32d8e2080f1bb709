"""Where a run happens: every line that knows Ray, and the command.

cli.py       the command: parse, load, call one function, print one result
__main__.py  the same where it is shipped, not installed
run.py       what the commands do, in this process or on Ray
planning/    what a run will take on a cluster, by the clock
generate.py  calibration texts from a pool of generators, on Ray Data
vllm.py      the same asked of vLLM, through Ray Data LLM
parcel.py    what travels through Ray Data
driver.py    pruning on a cluster, start to end
crew.py        the teams of a run, and their plans side by side
sweep.py       the dense model as a wave through the teams
stream.py      hidden states from team to team, a few micro-batches at a time
teams.py     the replicas of a shard, called together
actors.py    the plain ShardWorker as a Ray actor
plan.py      layers -> shards -> workers, as a value
reasons.py   why something failed, in a line, and what that means for the run
recovery.py  what to do when something is lost, as pure functions
session.py   a connection to Ray: what is there, and waiting for what is not
progress.py  what the user sees while it runs
metrics.py   what Prometheus sees
submit.py    a run as a Ray job: submit, follow, stop
submission.py  the same as values: its name, its attempts, what is sent
"""
