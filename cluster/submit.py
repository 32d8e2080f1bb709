"""The jobs of a cluster, by Ray's Jobs API: a run is submitted once, followed, stopped."""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from requests.exceptions import ChunkedEncodingError

import pipeline
from cluster import submission
from cluster.reasons import TOKEN, unreachable, without_token
from cluster.submission import LIVE, Attempt, digest, find_attempts, next_id, run_id, write_document
from pipeline.config import RunConfig
from pipeline.errors import Incomplete, Refusal
from pipeline.storage import concealed

Tell = Callable[[str], None]

# they tell of every package and connection
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_CONFIG_NAME = "run.yaml"
# Ray's own 3 seconds are less than a driver may need to give back workers and lease
_STOPS_WITHIN_SECONDS = 60
_CONNECTS_WITHIN_SECONDS, _ANSWERS_WITHIN_SECONDS = 10.0, 60.0
_ASKED_EVERY_SECONDS, _TOLD_EVERY_SECONDS, _SILENT_SECONDS = 1.0, 30.0, 60.0
_TAKEN = "already exists"


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's own would wait for an answer for ever, and tells a server that is away by its text alone."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        patience = (_CONNECTS_WITHIN_SECONDS, _ANSWERS_WITHIN_SECONDS)
        answer = super()._do_request(method, endpoint, timeout=patience, **options)
        if answer.status_code >= 500 and _TAKEN not in answer.text:
            reason = " ".join(answer.text.split())[:300]
            raise unreachable(f"--address {self._address}", f"status {answer.status_code}: {reason}")
        return answer


class Jobs:
    """The jobs of the cluster whose dashboard is at an address. Raises Incomplete where nobody answers there."""

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise Refusal(f"--address {address}: must be the http:// address of the dashboard, which serves Ray jobs")
        if "@" in address:
            raise Refusal(f"--address {concealed(address)}: a user or password is not part of it; {TOKEN}")
        # Ray would prefer an address in its environment to the one that is asked for
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address = address.rstrip("/")
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._asking():
            self._client = _Client(self.address)

    def attempts(self, run: str) -> list[Attempt]:
        """The attempts of a run that this cluster knows of, first to last."""
        with self._asking():
            jobs = self._client.list_jobs()
        return find_attempts(run, ((job.submission_id, str(job.status), _digest_of(job)) for job in jobs))

    def submit(self, submission_id: str, document: str) -> bool:
        """Submit a run's config with this code; False where the id is taken by now."""
        with tempfile.TemporaryDirectory() as folder, self._asking():
            Path(folder, _CONFIG_NAME).write_text(document, encoding="utf-8")
            try:
                self._client.submit_job(
                    entrypoint=f"exec python -m cluster run {_CONFIG_NAME}",
                    submission_id=submission_id,
                    runtime_env={
                        "working_dir": folder,
                        "py_modules": [_folder_of(pipeline.__file__), _folder_of(__file__)],
                        "excludes": ["__pycache__"],
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOPS_WITHIN_SECONDS)},
                    },
                    metadata={"config": digest(document)},
                )
            except RuntimeError as error:
                if _TAKEN not in str(error):
                    raise
                return False
        return True

    def follow(self, submission_id: str, write: Tell) -> Any:
        """Hand on a job's log from its beginning as it grows; returns what is known of the job when it has ended.

        Raises Incomplete where the cluster does not know the job any more.
        """
        self._await_start(submission_id, write)
        num_told = 0

        def tell(text: str) -> None:
            nonlocal num_told
            num_told += len(text)
            write(text)

        while True:
            # a stream that breaks, or is silent for long, is begun again for as long as the cluster answers
            with suppress(aiohttp.ClientError, RuntimeError, TimeoutError):
                asyncio.run(self._tail(submission_id, tell, num_told))
            details = self._details(submission_id)
            if details.status.is_terminal():
                return details
            time.sleep(_ASKED_EVERY_SECONDS)

    def _await_start(self, submission_id: str, write: Tell) -> None:
        """Until it is not pending any more, which is told now and then."""
        told = -_TOLD_EVERY_SECONDS
        while str((details := self._details(submission_id)).status) == "PENDING":
            if time.monotonic() - told >= _TOLD_EVERY_SECONDS:
                told = time.monotonic()
                write(f"job {submission_id} is PENDING ({' '.join((details.message or '').split())})\n")
            time.sleep(_ASKED_EVERY_SECONDS)

    def stop(self, submission_id: str) -> str:
        """Stop a job; returns its status when it has ended, or when it takes too long for it."""
        with self._asking():
            self._client.stop_job(submission_id)
        end = time.monotonic() + 1.5 * _STOPS_WITHIN_SECONDS
        while not (details := self._details(submission_id)).status.is_terminal() and time.monotonic() < end:
            time.sleep(_ASKED_EVERY_SECONDS)
        return str(details.status)

    def _details(self, submission_id: str) -> Any:
        """Raises Incomplete where a head that has started anew knows the job no more."""
        with self._asking():
            try:
                return self._client.get_job_info(submission_id)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
        raise Incomplete(f"the cluster knows of no job {submission_id} any more; submit the same config to resume")

    async def _tail(self, submission_id: str, tell: Tell, num_told: int) -> None:
        """Hand on the log but for the characters that have been told. Raises TimeoutError where nothing comes."""
        now = asyncio.get_running_loop().time
        async with (
            asyncio.timeout(_SILENT_SECONDS) as patience,
            aclosing(self._client.tail_job_logs(submission_id)) as chunks,
        ):
            async for chunk in chunks:
                patience.reschedule(now() + _SILENT_SECONDS)
                tell(chunk[num_told:])
                num_told = max(0, num_told - len(chunk))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What Ray raises, as what it means for the user."""
        where = f"--address {self.address}"
        try:
            yield
        except AuthenticationError:
            raise without_token(where) from None
        except (ConnectionError, requests.ConnectionError, requests.Timeout, ChunkedEncodingError) as error:
            raise unreachable(where, type(error).__name__) from None
        except (RuntimeError, requests.RequestException, ValueError) as error:
            if isinstance(error, Refusal | Incomplete):
                raise
            reason = " ".join(str(error).split())[:300]
            raise Refusal(f"{where}: Ray jobs are not to be had there ({reason}); give a Ray dashboard's") from None


def submit(config: RunConfig, jobs: Jobs, tell: Tell) -> str:
    """The submission id of the live attempt of a run: the one there is, else a new one."""
    run, document = run_id(config.output.path), write_document(config)
    while True:
        attempts = jobs.attempts(run)
        for attempt in attempts:
            if attempt.is_live:
                _check_same(attempt, document, config)
                tell(f"job {attempt.submission_id} is {attempt.status} already")
                return attempt.submission_id
        submission_id = next_id(run, attempts)
        # where another submission was faster, that one is looked for again
        if jobs.submit(submission_id, document):
            tell(f"job {submission_id} submitted")
            return submission_id


def wait(submission_id: str, jobs: Jobs, write: Tell) -> None:
    """Follow a job to its end. Raises Refusal or Incomplete as the run did."""
    details = jobs.follow(submission_id, write)
    submission.outcome(submission_id, str(details.status), details.driver_exit_code, details.message or "")


def stop(output: str, jobs: Jobs, tell: Tell) -> str:
    """Stop the live attempt of the run with an output.path; returns what became of it."""
    attempts = jobs.attempts(run_id(output))
    for attempt in attempts:
        if attempt.is_live:
            tell(f"job {attempt.submission_id} is told to stop")
            status = jobs.stop(attempt.submission_id)
            if status in LIVE:
                raise Incomplete(f"job {attempt.submission_id} was told to stop and is still {status}; ask again")
            return (
                f"job {attempt.submission_id} is {status}; what is committed is kept, submit the same config to resume"
            )
    return f"{output}: nothing to stop, {describe_job(output, attempts)}"


def describe_job(output: str, attempts: list[Attempt]) -> str:
    """The newest attempt of a run and its status."""
    if not attempts:
        return f"the cluster knows of no job {run_id(output)}"
    return f"job {attempts[-1].submission_id} is {attempts[-1].status}"


def _check_same(attempt: Attempt, document: str, config: RunConfig) -> None:
    """Raises Refusal where the live attempt is not of the same config: what changed would be ignored in silence."""
    if attempt.config != digest(document):
        raise Refusal(
            f"output.path = {config.output.path}: job {attempt.submission_id} is {attempt.status} with another config; "
            "stop it first, or give another output.path"
        )


def _digest_of(job: Any) -> str:
    return str((job.metadata or {}).get("config", ""))


def _folder_of(file: str | None) -> str:
    assert file is not None, "a package has an __init__.py"
    return str(Path(file).parent)
