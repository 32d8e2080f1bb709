"""The connection to a bucket, and what its errors mean for a run.

What a store says of an error is told by its code alone: its own words repeat who asked.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from threading import Event
from typing import Any

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore, S3Store

from pipeline.errors import Incomplete, Refusal

_NUM_ATTEMPTS = 10
# How long a request may take, and until when another is begun in its place. One moves at most a part of a file: a store
# that needs longer for that is as good as gone. A hasty one moves next to nothing, and a lease ends if it hangs.
_PATIENCE_SECONDS = {False: (120.0, 180.0), True: (10.0, 20.0)}
_METADATA_SERVERS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
_PASSING = (408, 409, 425, 429)
# Set once a store has answered this process, which then has credentials.
_ANSWERED = Event()


def connect(scheme: str, bucket: str, is_hasty: bool) -> Any:
    """The store of a bucket. Endpoint, region and credentials are what the usual variables or the instance say."""
    names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("GOOGLE_BASE_URL",)}[scheme]
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return _connect(scheme, bucket, endpoint, os.environ.get("AWS_MAX_ATTEMPTS", ""), *_PATIENCE_SECONDS[is_hasty])


@cache
def _connect(scheme: str, bucket: str, endpoint: str, attempts: str, seconds: float, all_seconds: float) -> Any:
    options: Any = {"timeout": timedelta(seconds=seconds)}
    num_attempts = max(1, int(attempts) if attempts.isdigit() else _NUM_ATTEMPTS)
    retries: Any = {"max_retries": num_attempts - 1, "retry_timeout": timedelta(seconds=all_seconds)}
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    if scheme == "gs":
        return GCSStore(bucket, client_options=options, retry_config=retries)
    return S3Store(bucket, client_options=options, retry_config=retries)


@contextmanager
def translated(path: str, bucket: str, writing: bool) -> Iterator[None]:
    """Turns errors of the store into FileNotFoundError, Refusal where running again cannot help, or Incomplete."""
    try:
        yield
        _ANSWERED.set()
    except FileNotFoundError as error:
        if writing:
            raise _meaning(path, bucket, error, writing) from None
        raise FileNotFoundError(path) from None
    except BaseError as error:
        raise _meaning(path, bucket, error, writing) from None


def _meaning(path: str, bucket: str, error: BaseError | FileNotFoundError, writing: bool) -> Refusal | Incomplete:
    text = str(error)
    code, number = re.search(r"<Code>(\w+)</Code>", text), re.search(r"status code: (\d{3})", text)
    http = int(number[1]) if number else 0
    reason = " ".join(found[1] for found in (number, code) if found) or "no connection"
    # the servers that give credentials may be busy too, later in a run
    if any(server in text for server in _METADATA_SERVERS) and not _ANSWERED.is_set():
        return Refusal(f"{path}: there are no credentials in the environment, nor does this instance have any")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or http in (401, 403):
        return Refusal(
            f"{path}: access denied ({reason}); give credentials that may list, read, write and delete there"
        )
    if code and code[1] == "NoSuchBucket":
        return Refusal(f"{path}: there is no bucket {bucket!r}; create it, or correct the path")
    if "redirect" in text:
        return Refusal(f"{path}: the bucket lies in another region; set AWS_REGION to it")
    # a 404 to a write: of an upload that an earlier try completed, whose answer was lost
    passes = http in _PASSING or (writing and http == 404) or (code and code[1] == "RequestTimeout")
    if 400 <= http < 500 and not passes:
        return Refusal(f"{path}: the object store refuses it ({reason}); check the path and the endpoint")
    told = f"{path}: the object store does not answer as it should ({reason})"
    return Incomplete(f"{told}; every committed layer is kept, run again to resume")
