"""The plain ShardWorker as a Ray actor, and what is measured where it will work."""

import os
import socket
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from pipeline.activations import from_integers, to_integers
from pipeline.config import RunConfig, WorkerSettings
from pipeline.errors import Refusal
from pipeline.job import Job, Resolved
from pipeline.micro_batch import measure_micro_batch
from pipeline.replicas import Meeting, Replica, interface_of, offer_meeting
from pipeline.worker import ShardWorker

Integers = npt.NDArray[np.integer]

# Calls of this group are answered beside the others, which come one by one.
COMMITS = "commits"


class ShardActor(ShardWorker):
    """Started by a call, so that what goes wrong in starting reaches the driver as the error it is.

    Hidden states come and go as integers, by the numbers that micro-batches have here.
    """

    def __init__(self) -> None:
        pass

    def meet(self, address: str) -> Meeting:
        """Where the replicas of this one's shard will find each other on the cluster at an address."""
        return offer_meeting(_host(address))

    def fetch(self, job: Job) -> None:
        """Have the model on this host."""
        job.find_source()

    def start(self, job: Job, rank: int, meeting: Meeting | None) -> str:
        """Begin as one replica of a shard; returns the id of the node.

        Raises Refusal where this host does not see the driver's run directory.
        """
        if not job.guard.is_ours:
            raise Refusal(
                f"output.path = {job.directory.path}: host {socket.gethostname()} does not see it; "
                "give a folder that every node of the cluster shares, or an s3:// or gs:// URL"
            )
        replica = None
        if meeting is not None:
            interface = interface_of(_host(job.config.cluster.address))
            if interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            replica = Replica(len(job.micro_batches), job.num_replicas, rank, meeting, job.resolved.device)
        super().__init__(job, replica, None if replica is None else rank)
        return str(ray.get_runtime_context().get_node_id())

    def make_room(self) -> None:
        """Room for the hidden states that `accept` then brings."""
        self.hidden.make_room()

    def export(self, index: int) -> Integers:
        """A micro-batch, for another worker."""
        return to_integers(self.hidden.states.read(index))

    def accept(self, index: int, integers: Integers) -> int:
        """Take over a micro-batch that another worker exported; returns its bytes."""
        self.hidden.states.write(index, from_integers(integers, self.skeleton.dtype))
        return integers.nbytes

    def pass_on(self, index: int, integers: Integers | None, is_wanted: bool) -> tuple[Integers | None, int]:
        """What the opened layer gives for a micro-batch, one that is given or one that is here; and the bytes given.

        Two results, since the driver waits for the second and never fetches the first.
        """
        given = None if integers is None else from_integers(integers, self.skeleton.dtype)
        output_BLH = self.step(index, given)
        return to_integers(output_BLH.cpu()) if is_wanted else None, 0 if integers is None else integers.nbytes


def begin_measuring(config: RunConfig, resolved: Resolved, num_gpus: float) -> Any:
    """A reference to the size of micro-batches that suits a worker, which is measured on one."""
    options = _resources(config.cluster.worker, num_gpus)
    return ray.remote(measure_micro_batch).options(**options).remote(config, resolved)


def create_actor(settings: WorkerSettings, num_gpus: float, strategy: Any) -> Any:
    """A handle to a new actor.

    It is never restarted by Ray: it would come back empty, and calls to it would succeed without the tokens it had.
    """
    options = {**_resources(settings, num_gpus), "scheduling_strategy": strategy}
    actor = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={COMMITS: 1})(ShardActor)
    return actor.options(**options).remote()


def _host(address: str) -> str:
    """This host as other replicas reach it; those of a Ray of its own meet where no other host comes."""
    return "127.0.0.1" if address == "local" else str(ray.util.get_node_ip_address())


def _resources(settings: WorkerSettings, num_gpus: float) -> dict[str, Any]:
    memory = {} if settings.memory_bytes is None else {"memory": settings.memory_bytes}
    return {"num_cpus": settings.num_cpus, "num_gpus": num_gpus, **memory}
