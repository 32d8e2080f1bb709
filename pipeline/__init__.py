"""What pruning a model is, in one process and without Ray.

config.py        every choice of a run
config_file.py   the same from YAML and overrides
settings.py        what all settings have in common
errors.py        what goes wrong, as a sentence and an exit code
preparation.py   checks everything, then settles it into a job           config -> job
job.py              what a worker is told
micro_batch.py      how many windows at a time, measured where that is asked for
record.py           run.yaml: what the run is
fingerprint.py      the same fingerprint, the same bytes
revision.py         {revision} in output.path
runtime.py          devices, threads and memory of this machine
calibration/     text or ready token ids -> windows
models/          a checkpoint's tensors, and its layers run one by one
planning/        what a run will cost, before it begins
segments.py      which activations a layer is pruned on, and what is left to do
worker.py        enters a layer, prunes it, runs it, goes on             windows -> activations -> committed layers
hidden.py          what a layer reads, kept every few layers
activations.py       in RAM or in a mapped file
loading.py         layers of the dense model, read ahead
passing.py         a layer of the dense model that micro-batches pass through
replicas.py        windows in parts, sums over all of them
observe.py         one layer: what its linears read, as statistics
groups.py            those that read the same
layer.py           one layer: pruned group by group
single_pass.py     one layer: observed, pruned and run at once
held.py              the memory that this takes
feedforward.py       the linears of a feed-forward block pruned as one
recording.py           what that block reads
permute.py         before N:M: channels in an order in which more of the important weights can stay
methods/             how: one file per published method
allocation/          how much in which layer
sparsity.py          what "pruned" means, exact counts
numerics/            statistics, masks, the solver
store.py         the run directory: commit, receipts, resume             committed layers -> model/
lease.py           one writer at a time
process.py         who that is, and whether it is gone
files.py           written whole or not at all
faults.py          what an error of a file system means
storage.py         folders and object stores by one kind of path
bucket.py          the connection to a bucket, and what its errors mean
export.py        index, config and tokenizer around the committed layers
evaluate.py      perplexity, streamed through the same layers            model/ -> perplexity
report.py        what came out
status.py        how far it is, from the run directory alone
clock.py           durations as they are read
local.py         all of it in this process
"""
