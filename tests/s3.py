"""A real S3 server, in a process of its own that can be killed and started again.

It answers one request at a time, as S3 does for one object, and can be told to refuse, to be busy or to be gone. What
Google's XML interface says in other words than S3 is put into those of S3, so that gs:// has somebody to talk to.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

ACCESS_KEY, SECRET_KEY = "AKIASHARDPRUNETEST00", "shardprune/test+secret0123456789abcdefgh"
BUCKET = "bucket"


class Server:
    """What it holds lies in its memory."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = [sys.executable, __file__, "127.0.0.1", str(self.port)]
        self._process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        make_bucket(self.address)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        self.send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def new_url(self, scheme: str = "s3") -> str:
        """A prefix below which there is nothing."""
        return f"{scheme}://{BUCKET}/{uuid.uuid4().hex}/out"

    def behave(self, how: str) -> None:
        """From now on: "" = as S3 does, "busy" = come again, "gone" = no answer, "forget" = what a second try to
        complete an upload is told; and for one method alone: "deny PUT" = it is not allowed, "miss PUT" = there is
        no such object, "slow PUT" = it took too long to arrive, "hang PUT" and "hang PUT once" = the connection stays
        open without an answer."""
        urlopen(Request(f"{self.address}/_behave", data=how.encode(), method="POST")).close()

    def num_parts(self) -> int:
        """How many parts of multipart uploads have arrived."""
        return self._count("num_parts")

    def num_hanging(self) -> int:
        """How many requests have been left hanging."""
        return self._count("num_hanging")

    def _count(self, name: str) -> int:
        with urlopen(f"{self.address}/_{name}") as answer:
            return int(answer.read())


def access(address: str) -> dict[str, str]:
    """The environment of a process that is to find the server at this address."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "3",
    }


def make_bucket(address: str) -> None:
    """Make the bucket as soon as the server at this address answers."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(OSError):
            urlopen(Request(f"{address}/{BUCKET}", method="PUT")).close()
            return
        time.sleep(0.05)
    raise AssertionError("the S3 server does not start")


@contextmanager
def serving() -> Iterator[Server]:
    """A server that the environment points to, here and in processes started from here."""
    server, cache = Server(), TemporaryDirectory()
    changed = {
        "XDG_CACHE_HOME": cache.name,
        **access(server.address),
        "GOOGLE_BASE_URL": server.address,
        "GOOGLE_BEARER_TOKEN": SECRET_KEY,
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        cache.cleanup()


def upload(folder: Path, url: str) -> str:
    """Copy a folder; returns the URL."""
    from pipeline.storage import ObjectPath, locate

    target = locate(url)
    assert isinstance(target, ObjectPath)
    for file in folder.rglob("*"):
        if file.is_file():
            (target / file.relative_to(folder)).upload(file)
    return url


def digests(url: str) -> dict[str, str]:
    """sha256 of every object below a URL, but not of the leases of a run, which tell of processes."""
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents(url).items()
        if not name.startswith("lease/")
    }


def contents(url: str) -> dict[str, bytes]:
    """Every object below a URL."""
    from pipeline.storage import locate, name_within

    folder = locate(url)
    return {str(name_within(path, folder)): path.read_bytes() for path in sorted(folder.rglob("*"), key=str)}


def names(url: str) -> list[str]:
    """The names of all objects below a URL."""
    from pipeline.storage import locate, name_within

    folder = locate(url)
    return sorted(str(name_within(path, folder)) for path in folder.rglob("*"))


def _serve(host: str, port: int) -> None:
    from threading import Lock

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    application, lock = DomainDispatcherApplication(create_backend_app), Lock()
    state = {"behaviour": "", "num_parts": 0, "num_hanging": 0}

    def answer(environ: dict, start_response: object) -> list[bytes]:  # type: ignore[type-arg]
        path, method, behaviour = environ["PATH_INFO"], environ["REQUEST_METHOD"], str(state["behaviour"])
        if path == "/_behave":
            state["behaviour"] = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
            return _say(start_response, "200 OK", "")
        if path.removeprefix("/_") in state:
            return _say(start_response, "200 OK", str(state[path.removeprefix("/_")]))
        if behaviour.startswith(f"hang {method}"):
            state["num_hanging"] = int(state["num_hanging"]) + 1
            if behaviour.endswith("once"):
                state["behaviour"] = ""
            time.sleep(3600)
        if behaviour in ("busy", f"deny {method}", f"slow {method}"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if behaviour == "gone":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return _say(start_response, "200 OK", "")
        if behaviour == "busy":
            return _say(start_response, "503 Service Unavailable", "<Error><Code>SlowDown</Code></Error>")
        if behaviour == f"slow {method}":
            return _say(start_response, "400 Bad Request", "<Error><Code>RequestTimeout</Code></Error>")
        if behaviour == f"miss {method}":
            return _say(start_response, "404 Not Found", "<Error><Code>NoSuchKey</Code></Error>")
        if behaviour == f"deny {method}":
            told = f"<Error><Code>AccessDenied</Code><AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId></Error>"
            return _say(start_response, "403 Forbidden", told)
        if environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH") == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        if environ.get("HTTP_AUTHORIZATION", "Bearer").startswith("Bearer"):
            environ["HTTP_AUTHORIZATION"] = f"AWS {ACCESS_KEY}:signature"
        with lock:
            state["num_parts"] = int(state["num_parts"]) + (
                method == "PUT" and "partNumber=" in environ["QUERY_STRING"]
            )
            if behaviour == "forget" and method == "POST" and "uploadId=" in environ["QUERY_STRING"]:
                list(application(environ, lambda *_: None))
                return _say(start_response, "404 Not Found", "<Error><Code>NoSuchUpload</Code></Error>")
            return list(application(environ, start_response))

    run_simple(host, port, answer, threaded=True, request_handler=MotoRequestHandler)


def _say(start_response, status: str, text: str) -> list[bytes]:  # type: ignore[no-untyped-def]
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
    return [text.encode()]


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
