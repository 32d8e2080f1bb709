"""The plain ShardWorker as a Ray actor."""

import socket
from typing import Any

import ray

from pipeline.config import WorkerSettings
from pipeline.errors import Refusal
from pipeline.job import Job
from pipeline.worker import ShardWorker


class ShardActor(ShardWorker):
    """Started by a call, so that what goes wrong in starting reaches the driver as the error it is."""

    def __init__(self) -> None:
        pass

    def start(self, job: Job) -> None:
        """Raises Refusal where this host does not see the driver's run directory."""
        if not job.guard.is_ours:
            raise Refusal(
                f"output.path = {job.directory.path}: host {socket.gethostname()} does not see it; "
                "give a folder that every node of the cluster shares, or an s3:// or gs:// URL"
            )
        super().__init__(job)


def create_actor(settings: WorkerSettings, num_gpus: float) -> Any:
    """A handle to a new actor.

    It is never restarted by Ray: it would come back empty, and calls to it would succeed without the tokens it had.
    """
    options: dict[str, Any] = {"num_cpus": settings.num_cpus, "num_gpus": num_gpus}
    if settings.memory_bytes is not None:
        options["memory"] = settings.memory_bytes
    return ray.remote(max_restarts=0, max_task_retries=0)(ShardActor).options(**options).remote()
