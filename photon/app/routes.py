"""What the page's script asks for: a visit, a scan into it, its voxels, what was kept, the end of the visit.

Whoever knows a visit's name reaches its scan, and nobody else; names are 24 random bytes and are in no log.
"""

import asyncio
import json
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from photon.app.niivue import niivue_bundle
from photon.app.scans import nifti_bytes, plain_fault, read_scan, sample, small_image
from photon.app.visits import Full
from photon.scan_faults_photon import VolumeError
from photon.serving.incoming import private_folder, read_incoming
from photon.viewer.export import HERE as VIEWER
from photon.viewer.export import html_page

HERE = Path(__file__).resolve().parent
SLOW = 60.0  # seconds without a byte after which an upload is given up


def build_routes(engine, visits, limits):
    """The router. engine: `Engine`; visits: `Visits`; limits: `Limits` of an upload."""
    router = APIRouter(prefix="/photon")
    files = {
        "viewer.js": VIEWER / "viewer.js", "viewer.css": VIEWER / "viewer.css",
        "app.js": HERE / "static" / "app.js", "app.css": HERE / "static" / "app.css",
    }  # fmt: skip

    def visit_of(name, with_scan=True):
        visit = visits.get(name)
        if visit is None or (with_scan and visit.scan is None):
            raise HTTPException(404, "This visit has ended, or it has no scan. Load the page again.")
        return visit

    def turn_of(visit, number):
        if not 0 <= number < len(visit.masks):
            raise HTTPException(404, "There is no question of that number.")
        return visit.masks[number]

    @router.get("/static/{name}")
    def static(name: str):
        file = niivue_bundle() if name == "niivue.js" else files.get(name)
        if file is None:
            raise HTTPException(404, "There is no such file.")
        return FileResponse(file, headers={"Cache-Control": "no-cache"})

    @router.post("/visits")
    def begin():
        try:
            return {"visit": visits.begin(), "with_3d": niivue_bundle() is not None}
        except Full as error:
            raise HTTPException(503, str(error)) from None

    @router.post("/visits/{name}/end")
    def end(name: str):
        visits.end(name)
        return {}

    @router.post("/visits/{name}/alive")
    def alive(name: str):
        visit_of(name, with_scan=False)
        return {}

    @router.post("/visits/{name}/scan")
    async def upload(name: str, request: Request, modality: str = "auto", series: int | None = None,
                     frame: int | None = None):  # fmt: skip
        visit = visit_of(name, with_scan=False)
        if modality not in ("auto", "ct", "mr"):
            raise HTTPException(422, "modality is auto, ct or mr.")
        with private_folder() as folder:
            await receive(request, folder / "upload", limits.upload_bytes)
            try:
                incoming = await run_in_threadpool(
                    read_incoming, folder / "upload", limits, engine.processor.image_processor, series, frame
                )
                scan = await run_in_threadpool(read_scan, engine, incoming.image, incoming.findings, modality)
            except VolumeError as error:
                return JSONResponse(plain_fault(error), 422)
        visit.show(scan)
        return scan.facts

    @router.post("/visits/{name}/sample/{number}")
    def take_sample(name: str, number: int):
        visit = visit_of(name, with_scan=False)
        image, lesions = sample(number)
        visit.show(read_scan(engine, image))
        return visit.scan.facts | {"lesions": lesions}

    @router.get("/visits/{name}/scan.json")
    def voxels(name: str):
        return Response(json.dumps(visit_of(name).scan.packed.scan), media_type="application/json")

    @router.get("/visits/{name}/questions.json")
    def questions(name: str):
        return Response(json.dumps(visit_of(name).turns), media_type="application/json")

    @router.get("/visits/{name}/page.html")
    def page(name: str):
        visit = visit_of(name)
        headers = {"Content-Disposition": 'attachment; filename="photon.html"'}
        return HTMLResponse(html_page(visit.scan.packed.scan, visit.turns), headers=headers)

    @router.get("/visits/{name}/scan.nii.gz")
    def scan_file(name: str):
        return image_response(small_image(visit_of(name).scan.image))

    @router.get("/visits/{name}/kept/{number}.nii.gz")
    def kept_file(name: str, number: int, small: bool = False):
        visit = visit_of(name)
        kept = engine.keep_map([visit.scan.encoded], turn_of(visit, number))
        return image_response(small_image(kept) if small else kept, f"kept_{number + 1}.nii.gz")

    return router


def image_response(image, filename="scan.nii.gz"):
    """A NIfTI file as a response; it lies on the disk only while it is compressed."""
    with private_folder() as folder:
        content = nifti_bytes(image, folder)
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content, media_type="application/gzip", headers=headers)


async def receive(request, path, most):
    """Writes a request's body to `path`. Raises 413 beyond `most` bytes, 408 where it comes too slowly."""
    declared = request.headers.get("content-length", "")
    received = 0
    too_large = HTTPException(413, f"The upload has more than {most >> 20} MiB, which is the limit here.")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    body = aiter(request.stream())
    with open(path, "wb") as out:
        while True:
            try:
                chunk = await asyncio.wait_for(anext(body), SLOW)
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError:
                raise HTTPException(408, "The upload stood still for too long; try again.") from None
            received += len(chunk)
            if received > most:
                raise too_large
            out.write(chunk)
    if not received:
        raise HTTPException(422, "The upload is empty. Choose a file.")
