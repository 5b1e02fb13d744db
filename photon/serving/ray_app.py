"""Workers on several GPUs or machines, each with the model, behind Ray Serve: `pip install "ray[serve]"`, then

    python -m photon.serving --model DIR --workers 4               # starts them on this machine, one a GPU
    serve deploy configs/ray_serve.yaml                            # or on a cluster that `ray up` made;
    RAY_ADDRESS=auto python -m photon.serving --workers 4          # then this finds them and starts none

The process that was started takes HTTP, reads uploads and puts them, preprocessed, into Ray's object store. Workers
encode and answer. Questions on a scan go to a worker that has encoded it (Ray's model multiplexing, with the scan in
the place of the model), so that they are batched there. When a worker dies, Ray starts another, which encodes the scan
from the object store.
"""

import asyncio
import os
import time
from collections import OrderedDict

import ray
from fastapi.concurrency import run_in_threadpool
from ray import serve
from ray.serve.exceptions import BackPressureError

from photon.loading import ROOT
from photon.serving.backend import ScanGone, events_of
from photon.serving.engine import Busy

NAME = "photon"
SCANS_OF_A_WORKER = 32


@serve.deployment(max_ongoing_requests=64, max_queued_requests=64, graceful_shutdown_timeout_s=5)
class Worker:
    """A model on one GPU, or on a CPU. Args: model: folder or Hub id; device: as of `photon.loading.load`."""

    def __init__(self, model, device="auto"):
        from photon.loading import load
        from photon.serving.engine import Engine

        self.engine, self.prepared = Engine(*load(model, device)), {}

    @serve.multiplexed(max_num_models_per_replica=SCANS_OF_A_WORKER)
    async def scan(self, key):
        """The encoded scan of a key; Ray keeps the last ones."""
        prepared = await self.prepared[key]
        return await asyncio.to_thread(self.engine.encode, prepared)

    async def stream(self, chat, keys, prepared, timeout, options):
        """Yields pieces of text, then the `Answer`, then this process' number. prepared: object references by key."""
        self.prepared |= prepared
        scans = [await self.scan(key) for key in keys]
        async for event in events_of(self.engine, chat, scans, timeout, options):
            yield event
        yield os.getpid()


def workers(args):
    """The application for `serve run` and `serve deploy`. args: model, replicas, gpus and device, as texts."""
    model = args.get("model") or str(os.environ.get("PHOTON_MODEL", ""))
    options = {"num_gpus": float(args.get("gpus", 1)), "num_cpus": float(args.get("cpus", 1))}
    worker = Worker.options(num_replicas=int(args.get("replicas", 1)), ray_actor_options=options)
    return worker.bind(model, args.get("device", "auto"))


class RayBackend:
    """Workers of Ray Serve as the server's backend.

    Args: handle: of the application of `workers`; processor: a `PhotonVolumeProcessor`; most_bytes: of preprocessed
        scans in the object store; the one used least recently is dropped first.
    """

    queue_length = 0  # Ray counts what waits, in metrics of its own

    def __init__(self, handle, processor, most_bytes=8 << 30):
        self.handle, self.processor, self.most_bytes = handle, processor, most_bytes
        self.held, self.nbytes, self.last_worker = OrderedDict(), 0, None

    async def has(self, key):
        """Whether that scan is in the object store."""
        if key in self.held:
            self.held.move_to_end(key)
        return key in self.held

    async def encode(self, key, image, **fields):
        """Preprocesses a SimpleITK image and puts it into the object store. Raises `VolumeError`."""
        prepared = await run_in_threadpool(self.processor, [image], return_tensors="pt", **fields)
        size = prepared["pixel_values_videos"].nbytes
        self.held[key] = ray.put(prepared), size
        self.nbytes += size
        while len(self.held) > 1 and self.nbytes > self.most_bytes:
            self.nbytes -= self.held.popitem(last=False)[1][1]

    async def stream(self, chat, keys, timeout, **options):
        """Yields pieces of text, then the `Answer`. Raises what a worker's engine raises, `Busy` and `ScanGone`."""
        if any(key not in self.held for key in keys):
            raise ScanGone("A scan is not held any more; upload it again.")
        prepared = {key: self.held[key][0] for key in keys}
        handle = self.handle.options(stream=True, multiplexed_model_id=keys[0])
        events = handle.stream.remote(chat, keys, prepared, timeout, options)
        try:
            async for event in events:
                if isinstance(event, int):
                    self.last_worker = event
                    return
                yield event
        except BackPressureError:
            raise Busy("Too many questions wait already; ask again later.") from None
        finally:
            events.cancel()


def start_workers(model, count, gpus, device):
    """The handle of the workers: those that are deployed, else `count` new ones.

    The variable RAY_ADDRESS names the cluster; without it, one of our own is started on this machine. Raises
    `ConnectionError` where the cluster cannot be reached, or its workers did not start.
    """
    if not ray.is_initialized():
        places = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # where workers on this machine find the code
        address = os.environ.get("RAY_ADDRESS", "local")  # never a cluster that happens to run here
        ray.init(address, log_to_driver=False, include_dashboard=False, runtime_env=places)
    serve.start(proxy_location="Disabled")  # requests come through our server, which checks the tokens
    while (found := serve.status().applications.get(NAME)) and found.status in ("NOT_STARTED", "DEPLOYING"):
        time.sleep(1)
    if found and found.status == "DEPLOY_FAILED":
        raise ConnectionError(f"The workers of the cluster did not start, see `serve status`: {found.message}")
    if found:
        return serve.get_app_handle(NAME)
    args = {"model": model, "replicas": count, "gpus": gpus, "device": device}
    return serve.run(workers(args), name=NAME, route_prefix=None)
