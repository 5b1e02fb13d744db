"""Workers behind Ray Serve: two replicas on the CPU answer as one process does, and one of them may die."""

import asyncio
import os
import signal
import time

import pytest
import torch

ray = pytest.importorskip("ray", reason='pip install "ray[serve]"')
pytest.importorskip("ray.serve", reason='pip install "ray[serve]"')

from conftest import ROOT, TOKENS  # noqa: E402
from photon import asking  # noqa: E402
from photon.app.scans import sample  # noqa: E402
from photon.loading import load  # noqa: E402
from photon.serving.backend import ScanGone  # noqa: E402
from photon.serving.engine import Answer  # noqa: E402

QUESTIONS = [f"Is there a lesion in the {organ}?" for organ in ("liver", "spleen", "right lung")]


@pytest.fixture(scope="module")
def models():
    return load(ROOT)


@pytest.fixture(scope="module")
def backend(models):
    from photon.serving.ray_app import RayBackend, start_workers

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 makes workers wait for minutes on a busy machine
    handle = start_workers(str(ROOT), 2, 0, "cpu")
    yield RayBackend(handle, models[0].image_processor)
    ray.serve.shutdown()
    ray.shutdown()


def chat(question):
    return [{"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": question}]}]


async def answer(backend, key, question):
    """The answer and the number of the process that gave it."""
    events = [event async for event in backend.stream(chat(question), [key], 120.0)]
    assert isinstance(events[-1], Answer) and "".join(events[:-1]).strip() == events[-1].text
    return events[-1], backend.last_worker


def test_two_workers_answer_as_one_process(backend, models):
    images = [sample(number)[0] for number in range(3)]

    async def all_of_them():
        for number, image in enumerate(images):
            await backend.encode(f"scan {number}", image)
        first = await asyncio.gather(*(answer(backend, f"scan {n}", q) for n in range(3) for q in QUESTIONS))
        later = [await answer(backend, f"scan {n}", QUESTIONS[0]) for n in range(3) for _ in range(3)]
        return first, later

    first, later = asyncio.run(all_of_them())
    for number, image in enumerate(images):
        for place, question in enumerate(QUESTIONS):
            given = first[3 * number + place][0]
            result, _, keep = asking.ask(*models, [image], question)
            assert given.text == result["answer"] and given.tokens_seen == TOKENS
            assert torch.equal(given.keep_mask, keep[0])
    assert len({worker for _, worker in [*first, *later]}) == 2  # both work


def test_workers_are_reached_through_the_server_alone(backend):
    """No HTTP of Ray's own, which would ask for no token."""
    assert ray.serve.status().proxies == {}


def test_workers_are_found_again(backend):
    from photon.serving.ray_app import start_workers

    start_workers("no such folder", 5, 0, "cpu")
    application = ray.serve.status().applications["photon"]
    assert application.deployments["Worker"].replica_states == {"RUNNING": 2}


def test_a_worker_may_die(backend):
    """Ray starts another, and the scan is encoded again from the object store."""

    async def around_a_death():
        _, worker = await answer(backend, "scan 0", QUESTIONS[0])
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 120
        while True:
            try:
                return worker, await answer(backend, "scan 0", QUESTIONS[0])
            except ray.exceptions.RayError:
                assert time.monotonic() < end
                await asyncio.sleep(1)

    before, (given, after) = asyncio.run(around_a_death())
    assert given.tokens_seen == TOKENS and after != before


def test_scans_are_dropped(backend):
    async def dropped():
        backend.most_bytes = 1
        await backend.encode("another", sample(4)[0])
        assert list(backend.held) == ["another"] and not await backend.has("scan 0")
        with pytest.raises(ScanGone):
            await answer(backend, "scan 0", QUESTIONS[0])

    asyncio.run(dropped())
