"""A cluster that is away, or answers strangely, and who asks it for jobs: an HTTP server in its place."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from aiohttp import web

from cluster import submit
from cluster.submit import Jobs
from pipeline.errors import Incomplete, Refusal

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

RAY_VERSION = {"ray_version": "2.60.0"}
JOB = "shardprune-run-0-1"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps its address here for the rest of the process."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")


@contextmanager
def dashboard(answer: Answer) -> Iterator[str]:
    """The address of a server that tells its version and answers all else as it is told."""
    loop, stopping, addresses = asyncio.new_event_loop(), asyncio.Event(), []
    started = threading.Event()

    async def serve() -> None:
        application = web.Application()
        application.router.add_get("/api/version", version)
        application.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(application, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        addresses.append("http://{}:{}".format(*runner.addresses[0]))
        started.set()
        await stopping.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(30)
        loop.close()


async def version(request: web.Request) -> web.StreamResponse:
    return web.json_response(RAY_VERSION)


def always(status: int, text: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    return answer


def details(status: str) -> web.StreamResponse:
    known = {"type": "SUBMISSION", "submission_id": JOB, "status": status, "entrypoint": "", "driver_exit_code": 0}
    return web.Response(text=json.dumps(known), content_type="application/json")


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_that_fails_is_asked_again_another_time(status: int) -> None:
    with dashboard(always(status, "No available agent to submit job, please try again later.")) as address:
        jobs = Jobs(address)
        for ask in (lambda: jobs.attempts("run"), lambda: jobs.submit(JOB, ""), lambda: jobs.stop(JOB)):
            with pytest.raises(Incomplete, match=f"status {status}: No available agent"):
                ask()


def test_a_proxy_before_a_head_that_is_away_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "version", always(503, "no healthy upstream"))
    with dashboard(always(503, "")) as address, pytest.raises(Incomplete, match="no healthy upstream"):
        Jobs(address)


def test_what_is_no_dashboard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "version", always(404, "not here"))
    with dashboard(always(404, "")) as address, pytest.raises(Refusal, match="404"):
        Jobs(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://host.invalid:8265"])
def test_where_nobody_answers_it_may_be_the_address_or_the_moment(address: str) -> None:
    with pytest.raises(Incomplete, match=r"no Ray cluster answers there.*address is right.*run again"):
        Jobs(address)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "http://", "http://user:secret@host:8265"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(Refusal) as refused:
        Jobs(address)
    assert "secret" not in str(refused.value)


def test_an_id_that_is_taken_is_no_failure_of_the_server() -> None:
    """Ray tells it as one."""
    with dashboard(always(500, f"ValueError: Job with submission_id {JOB} already exists.")) as address:
        assert Jobs(address).submit(JOB, "") is False


def test_a_log_that_falls_silent_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the head's host has vanished: the connection stays open, and nothing comes of it."""
    monkeypatch.setattr(submit, "_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(submit, "_ASKED_EVERY_SECONDS", 0.0)
    told: list[str] = []
    num_tails, num_left = 0, 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal num_tails, num_left
        if not request.path.endswith("/logs/tail"):
            return details("SUCCEEDED" if "layer 2" in "".join(told) else "RUNNING")
        num_tails += 1
        tail = web.WebSocketResponse()
        await tail.prepare(request)
        await tail.send_str("layer 1\n")
        if num_tails > 1:
            await tail.send_str("layer 2\n")
            return tail
        with suppress(TimeoutError):
            await tail.receive(20)
            num_left += 1
        return tail

    with dashboard(answer) as address:
        Jobs(address).follow(JOB, told.append)
    assert "".join(told) == "layer 1\nlayer 2\n" and num_left == 1
