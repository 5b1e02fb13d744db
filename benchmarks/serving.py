"""The server under load, on this machine alone: answers a second, time to answer, memory, and what it refuses.

    python benchmarks/serving.py [--preset load|smoke] [--json benchmarks/results/serving.json]

Starts `python -m photon.serving` with the tiny model on the loopback address. First one client asks questions on one
scan one after the other, then 16 clients ask at the same time, which the server answers in batches. Then 16 clients do
all sorts of things for two minutes: questions, streams, uploads, malformed bodies, paths out of the folder, no token,
and hanging up in the middle. Every reply must be what its request deserves; the resident memory is noted all along.
"""

import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import SimpleITK as sitk
import torch

from common import ROOT, arguments, report
from photon.phantoms.patient import make_patient

PRESETS = {"load": (20.0, 120.0), "smoke": (3.0, 8.0)}  # seconds: of each speed, of the mixed load
CLIENTS, TOKEN = 16, "token-of-the-benchmark"
ORGANS = ("liver", "spleen", "left kidney", "right kidney", "left lung", "right lung")
EXPECTED = {  # what each kind of request may get; 0: the client left before
    "question": {200, 429, 504}, "stream": {200, 429, 504}, "upload": {200}, "malformed": {400}, "outside": {422},
    "no token": {401}, "oversized": {413}, "hang up": {0, 200, 429, 499},
}  # fmt: skip
WEIGHTS = {"question": 50, "stream": 20, "upload": 4, "malformed": 6, "outside": 5, "no token": 5, "oversized": 4,
           "hang up": 6}  # fmt: skip


class Server:
    """The server's process. Args: folder: for temporary files and its scans."""

    def __init__(self, folder):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "PHOTON_TOKENS": TOKEN, "TMPDIR": str(folder), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "photon.serving", "--port", str(port), "--folder", str(folder / "scans")]
        self.log = open(folder / "log", "wb")
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log)

    async def ready(self, client):
        """Waits until it answers; raises `RuntimeError` where it does not start."""
        for _ in range(600):
            try:
                if (await client.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                break
            await asyncio.sleep(0.2)
        raise RuntimeError("The server did not start; run python -m photon.serving to see why.")

    def memory(self):
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()


def body(file_id, **more):
    question = f"Is there a lesion in the {random.choice(ORGANS)}?"
    content = [{"type": "volume", "file_id": file_id}, {"type": "text", "text": question}]
    return {"model": "photon", "messages": [{"role": "user", "content": content}]} | more


async def answered(client, file_id, seconds, clients):
    """Answers a second of so many clients that ask one question after the other, and the mean batch."""
    batches, end = [], time.monotonic() + seconds

    async def ask():
        while time.monotonic() < end:
            reply = await client.post("/v1/chat/completions", json=body(file_id))
            batches.append(reply.json()["photon"]["batch"])

    start = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(clients)))
    return len(batches) / (time.monotonic() - start), statistics.mean(batches)


async def one(client, kind, file_ids, content):
    """Sends a request of a kind; returns its status, 0 where it was left."""
    chat = "/v1/chat/completions"
    if kind == "question":
        return (await client.post(chat, json=body(random.choice(file_ids)))).status_code
    if kind == "stream":
        async with client.stream("POST", chat, json=body(random.choice(file_ids), stream=True)) as reply:
            text = "".join([piece async for piece in reply.aiter_text()])
            return reply.status_code if reply.status_code != 200 or "[DONE]" in text else -1
    if kind == "upload":
        reply = await client.post("/v1/files", files={"file": ("scan", content)})
        if reply.status_code == 200:
            file_ids[:] = [file_ids[0], *file_ids[-7:], reply.json()["id"]]
        return reply.status_code
    if kind == "malformed":
        return (await client.post(chat, content=random.choice([b"{", b"", b"[]", b"\xff"]))).status_code
    if kind == "outside":
        scan = {"type": "volume", "path": random.choice(["../log", "/etc/passwd", "nothing.nii.gz", ".."])}
        content = [scan, {"type": "text", "text": "?"}]
        sent = {"model": "photon", "messages": [{"role": "user", "content": content}]}
        return (await client.post(chat, json=sent)).status_code
    if kind == "no token":
        headers = {"Authorization": random.choice(["", "Bearer x", f"Bearer {TOKEN}x"])}
        return (await client.post(chat, json=body(file_ids[0]), headers=headers)).status_code
    if kind == "oversized":
        return (await client.post(chat, content=bytes(2 << 20))).status_code
    try:  # hang up
        reply = await client.post(chat, json=body(file_ids[0]), timeout=random.uniform(0.005, 0.3))
        return reply.status_code
    except httpx.TimeoutException:
        return 0


async def mixed(client, server, file_ids, contents, seconds):
    """Two minutes of everything: {kind: Counter of statuses}, seconds of good answers, [(second, resident bytes)]."""
    statuses, times, memory = {kind: Counter() for kind in WEIGHTS}, [], []
    start = time.monotonic()

    async def visitor(seed):
        draw = random.Random(seed)
        while time.monotonic() - start < seconds:
            kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            begin = time.monotonic()
            try:
                status = await one(client, kind, file_ids, draw.choice(contents))
            except httpx.TransportError as error:
                status = type(error).__name__
            statuses[kind][status] += 1
            if kind in ("question", "stream") and status == 200:
                times.append(time.monotonic() - begin)

    async def watch():
        while time.monotonic() - start < seconds:
            memory.append((time.monotonic() - start, server.memory()))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(visitor(seed) for seed in range(CLIENTS)))
    return statuses, sorted(times), memory


async def run(folder, preset):
    """All of it: rows, ratios and facts of the report."""
    speed_seconds, load_seconds = PRESETS[preset]
    (folder / "scans").mkdir()
    contents = []
    for patient in range(4):
        sitk.WriteImage(make_patient(5, patient)[0], str(folder / "scans" / f"{patient}.nii.gz"), useCompression=True)
        contents.append((folder / "scans" / f"{patient}.nii.gz").read_bytes())
    server = Server(folder)
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=180, limits=limits) as client:
            await server.ready(client)
            uploads = [await client.post("/v1/files", files={"file": ("scan", content)}) for content in contents]
            file_ids = [reply.json()["id"] for reply in uploads]
            await answered(client, file_ids[0], speed_seconds / 4, CLIENTS)  # warms up
            alone, _ = await answered(client, file_ids[0], speed_seconds, 1)
            together, batch = await answered(client, file_ids[0], speed_seconds, CLIENTS)
            statuses, times, memory = await mixed(client, server, file_ids, contents, load_seconds)
            alive = (await client.get("/health")).status_code == 200
            left = [file for file in folder.glob("photon-upload-*") if any(file.iterdir())]
    finally:
        server.stop()
    rows = []
    for kind, counted in statuses.items():
        wrong = sum(count for status, count in counted.items() if status not in EXPECTED[kind])
        listed = ", ".join(f"{status}: {count}" for status, count in sorted(counted.items(), key=str))
        rows.append({"request": kind, "sent": counted.total(), "wrong": wrong, "statuses": listed})
    quarter, last = memory[len(memory) // 4 :][:5], memory[-5:]
    before, after = (statistics.mean(value for _, value in part) for part in (quarter, last))
    ratios = {
        "batched_speedup": together / alone,
        "memory_end_over_first_quarter": after / before,
        "wrong_replies": float(sum(row["wrong"] for row in rows)),
    }
    facts = {
        "clients": CLIENTS, "load_seconds": load_seconds, "questions_a_second_one_by_one": alone,
        "questions_a_second_batched": together, "mean_batch": batch, "answers_under_load": len(times),
        "answers_a_second_under_load": len(times) / load_seconds, "seconds_median": times[len(times) // 2],
        "seconds_95_percent": times[int(0.95 * len(times))], "seconds_longest": times[-1],
        "memory_mib_first_quarter": before / 2**20, "memory_mib_end": after / 2**20,
        "memory_mib_peak": max(value for _, value in memory) / 2**20, "alive_after": alive, "files_left": len(left),
    }  # fmt: skip
    return rows, ratios, facts


def main():
    options = arguments(__doc__, list(PRESETS))
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows, ratios, facts = asyncio.run(run(Path(folder), options.preset))
    for name, value in facts.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    report(torch.device("cpu"), rows, ratios, options.json, **facts)
    if ratios["wrong_replies"] or not facts["alive_after"] or facts["files_left"]:
        sys.exit("The server gave a wrong reply, died, or left files; see above.")


if __name__ == "__main__":
    main()
