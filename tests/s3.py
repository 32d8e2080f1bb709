"""A real S3 server on loopback, in a process of its own that can be killed and started again.

It answers one request at a time, as S3 does for one object, and asks a file beside its port what to refuse.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

ACCESS_KEY, SECRET_KEY = "AKIASHARDPRUNETEST00", "shardprune/test+secret0123456789abcdefgh"
BUCKET = "bucket"


class Server:
    """`address` stays the same when the server is killed and started again; what it held is lost, as it is in memory."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = [sys.executable, __file__, str(self.port)]
        self._process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError):
                urlopen(Request(f"{self.address}/{BUCKET}", method="PUT")).close()
                return
            time.sleep(0.05)
        raise AssertionError("the S3 server does not start")

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        self.send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def behave(self, how: str) -> None:
        """From now on: "" = as S3 does, "deny PUT" = no PUT is allowed, "fail" = every answer is an error of its own."""
        urlopen(Request(f"{self.address}/_behave", data=how.encode(), method="POST")).close()

    def num_parts(self) -> int:
        """How many parts of multipart uploads have arrived."""
        with urlopen(f"{self.address}/_parts") as answer:
            return int(answer.read())


@contextmanager
def serving() -> Iterator[Server]:
    """A server that the environment points to, here and in processes started from here."""
    server = Server()
    changed = {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "3",
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


def _serve(port: int) -> None:
    from threading import Lock

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    application, lock = DomainDispatcherApplication(create_backend_app), Lock()
    state = {"behaviour": "", "num_parts": 0}

    def answer(environ: dict, start_response: object) -> list[bytes]:  # type: ignore[type-arg]
        path, method, behaviour = environ["PATH_INFO"], environ["REQUEST_METHOD"], str(state["behaviour"])
        if path == "/_behave":
            state["behaviour"] = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
            return _say(start_response, "200 OK", "")
        if path == "/_parts":
            return _say(start_response, "200 OK", str(state["num_parts"]))
        environ["wsgi.input"].read() if behaviour else None
        if behaviour == "fail":
            return _say(start_response, "503 Service Unavailable", "<Error><Code>SlowDown</Code></Error>")
        if behaviour == f"deny {method}":
            told = f"<Error><Code>AccessDenied</Code><AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId></Error>"
            return _say(start_response, "403 Forbidden", told)
        with lock:
            state["num_parts"] = int(state["num_parts"]) + (method == "PUT" and "partNumber=" in environ["QUERY_STRING"])
            return list(application(environ, start_response))

    run_simple("127.0.0.1", port, answer, threaded=True, request_handler=MotoRequestHandler)


def _say(start_response, status: str, text: str) -> list[bytes]:  # type: ignore[no-untyped-def]
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
    return [text.encode()]


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
