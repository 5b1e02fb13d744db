"""The HTTP side: the OpenAI API for scans, with health and metrics.

POST /v1/files                uploads a scan, which is read at once: one that is refused says why
GET, DELETE /v1/files[/ID]    what the caller's token has uploaded
POST /v1/chat/completions     a question about scans, whole or as a stream
GET /v1/models[/ID], /health, /metrics
"""

import asyncio
import json
import secrets
import time
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from photon.scan_faults_photon import VolumeError
from photon.serving.access import Gate, error_body
from photon.serving.backend import ScanGone
from photon.serving.chat import READING, RequestError, parse_request
from photon.serving.engine import Answer, Busy, EngineError
from photon.serving.files import GONE, Files, content_key, path_below, path_key
from photon.serving.incoming import private_folder, read_incoming, read_place, sweep
from photon.serving.metrics import Metrics

MOST_JSON = 1 << 20  # bytes of a request without a file
STATUS = {Busy: (429, "busy"), TimeoutError: (504, "timeout"), EngineError: (500, "engine_error"),
          ScanGone: (410, "scan_gone")}  # fmt: skip


def build_server(backend, tokens, limits, model="photon", folder=None, timeout=120.0, readers=2, processor=None,
                 store=None):  # fmt: skip
    """The ASGI app.

    Args:
        backend: `LocalBackend` or another; store: its `ScanStore`, for the metrics.
        tokens: `Tokens`; limits: `Limits` of an upload; readers: scans read at the same time.
        model: the name that the API gives it; folder: of scans that requests may name by path, or `None`.
        timeout: seconds for an answer, with waiting; processor: a `PhotonVolumeProcessor`, whose ways are followed.
    """

    @asynccontextmanager
    async def lifespan(app):
        sweep()
        yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    files, metrics, started = Files(), Metrics(backend, store), int(time.time())
    reading = asyncio.Semaphore(readers)

    async def held(read, key, options):
        """Reads and encodes a scan unless it is held. read: a function without arguments, run in a thread."""
        if await backend.has(key):
            return
        async with reading:
            incoming = await run_in_threadpool(read)
            fields = {name: value for name, value in options.items() if name == "modality"}
            await backend.encode(key, incoming.image, **fields)

    async def keys_of(scans, owner):
        """The keys of a request's scans, those by path read where they are not held."""
        keys = []
        for scan in scans:
            options = {name: scan[name] for name in READING if name in scan}
            if "file_id" in scan:
                file = files.get(scan["file_id"], owner)
                if file is None or not await backend.has(file.key):
                    raise RequestError(GONE, "messages", 404, "file_not_found")
                if options:
                    raise RequestError("modality, series and frame are given with the upload.", "messages")
                keys.append(file.key)
            else:
                path = path_below(folder, scan["path"])
                key = await run_in_threadpool(path_key, path, options)
                ways = {name: options.get(name) for name in ("series", "frame")}

                def read(path=path, ways=ways):
                    return read_place(path, limits, processor, **ways)

                await held(read, key, options)
                keys.append(key)
        return keys

    # === Models, health, metrics =====================================================================================

    entry = {"id": model, "object": "model", "created": started, "owned_by": "photon"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        if name != model:
            raise RequestError(f"There is no model of that name; expected {model}.", "model", 404, "model_not_found")
        return entry

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def read_metrics():
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    # === Files =======================================================================================================

    @app.post("/v1/files")
    async def upload(request: Request):
        async with request.form(max_files=1, max_fields=8, max_part_size=1000) as form:
            sent = form.get("file")
            if not hasattr(sent, "read"):
                raise RequestError("Send the scan as the form's field file.", "file")
            options = reading_options(form)
            with private_folder() as room:
                nbytes = await run_in_threadpool(copy, sent.file, room / "upload")
                key = await run_in_threadpool(content_key, room / "upload", options)
                ways = {name: options.get(name) for name in ("series", "frame")}
                await held(lambda: read_incoming(room / "upload", limits, processor, **ways), key, options)
        owner = request.state.owner
        name = files.add(key, owner, nbytes)
        return file_object(name, files.get(name, owner))

    @app.get("/v1/files")
    async def list_files(request: Request):
        listed = [file_object(name, file) for name, file in files.of(request.state.owner)]
        return {"object": "list", "data": listed, "has_more": False}

    @app.get("/v1/files/{name}")
    async def one_file(name: str, request: Request):
        file = files.get(name, request.state.owner)
        if file is None:
            raise RequestError(GONE, "file_id", 404, "file_not_found")
        return file_object(name, file)

    @app.delete("/v1/files/{name}")
    async def delete_file(name: str, request: Request):
        if not files.remove(name, request.state.owner):
            raise RequestError(GONE, "file_id", 404, "file_not_found")
        return {"id": name, "object": "file", "deleted": True}

    # === Questions ===================================================================================================

    @app.post("/v1/chat/completions")
    async def complete(request: Request):
        start = time.monotonic()
        asked = parse_request(parse_json(await request.body()), [model])
        keys = await keys_of(asked.scans, request.state.owner)
        events = backend.stream(asked.chat, keys, timeout, **asked.options)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        # what is wrong from the start becomes a status, not a part of a stream
        event = await unless_left(anext(events) if asked.stream else last_of(events), request)
        if event is None:
            metrics.hung_up.inc()
            return Response(status_code=499)  # nobody reads it
        if asked.stream:
            return StreamingResponse(
                chunks(event, events, head, asked.with_usage, metrics, start), media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        answer = event
        metrics.answered(answer, time.monotonic() - start)
        if answer.finish_reason == "timeout" and not answer.text:
            raise TimeoutError("The answer took too long; ask again later.")
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason(answer), "logprobs": None}
        return head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(answer),
            "photon": kept(answer),
        }

    # === Errors ======================================================================================================

    @app.exception_handler(RequestError)
    async def on_request_error(request, error):
        return JSONResponse(error_body(str(error), error.code, error.param), error.status)

    @app.exception_handler(VolumeError)
    async def on_volume_error(request, error):
        return JSONResponse(error_body(str(error), error.fault.value, "file"), 422)

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        return JSONResponse(error_body(str(error.detail), "http_error"), error.status_code)

    async def on_known_error(request, error):
        status, code = STATUS[type(error)]
        headers = {"Retry-After": "2"} if status in (429, 504) else None
        return JSONResponse(error_body(str(error), code), status, headers)

    for kind in STATUS:
        app.add_exception_handler(kind, on_known_error)

    @app.exception_handler(ValueError)
    async def on_value_error(request, error):  # of the options of generation, which says what to do
        return JSONResponse(error_body(str(error), "invalid_request"), 400)

    def count(scope, status):
        metrics.requests.labels(getattr(scope.get("route"), "path", "other"), status).inc()

    most = {"/v1/files": limits.upload_bytes + (64 << 10), "": MOST_JSON}
    app.add_middleware(Gate, tokens=tokens, open_paths={"/health"}, most=most, on_status=count)
    return app


async def unless_left(work, request):
    """What `work` returns, `None` where the client hung up before; then the work is cancelled at once.

    The request's body must have been read: what the client sends after it is that it hangs up.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            return None
        return task.result()
    finally:
        gone.cancel()


async def hung_up(request):
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def last_of(events):
    """The last of the events; they are closed however this ends."""
    last = None
    try:
        async for event in events:
            last = event
    finally:
        await events.aclose()
    return last


async def chunks(first, events, head, with_usage, metrics, start):
    """Server-sent events of an answer. When the client hangs up, this is closed, and so is the answer."""

    def sent(delta, finish=None, **more):
        choices = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
        body = head | {"object": "chat.completion.chunk", "choices": choices} | more
        return f"data: {json.dumps(body)}\n\n"

    event, done = first, False
    try:
        yield sent({"role": "assistant", "content": ""})
        while not isinstance(event, Answer):
            yield sent({"content": event})
            event = await anext(events)
        metrics.answered(event, time.monotonic() - start)
        yield sent({}, reason(event), photon=kept(event))
        if with_usage:
            body = head | {"object": "chat.completion.chunk", "choices": [], "usage": usage(event)}
            yield f"data: {json.dumps(body)}\n\n"
        yield "data: [DONE]\n\n"
        done = True
    except (EngineError, TimeoutError) as error:
        done = True
        yield f"data: {json.dumps(error_body(str(error), STATUS[type(error)][1]))}\n\n"
    finally:
        if not done:
            metrics.hung_up.inc()
        await events.aclose()


def reason(answer):
    """Why an answer ended, in the API's words."""
    return answer.finish_reason if answer.finish_reason in ("stop", "length") else "length"


def usage(answer):
    """Counts of tokens; the prompt's are those before the cut."""
    total = answer.prompt_tokens + answer.answer_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.answer_tokens, "total_tokens": total}


def kept(answer):
    """What the API does not know: visual tokens kept and seen, threshold, grounding, seconds, the batch."""
    seconds = {name: round(value, 4) for name, value in answer.seconds.items()}
    return {"tokens_kept": answer.tokens_kept, "tokens_seen": answer.tokens_seen, "threshold": answer.threshold,
            "grounding": answer.grounding, "seconds": seconds, "batch": answer.batch,
            "finish_reason": answer.finish_reason}  # fmt: skip


def file_object(name, file):
    """A file as the API gives it, under no name of the client's."""
    return {"id": name, "object": "file", "bytes": file.nbytes, "created_at": file.created, "filename": "scan",
            "purpose": "user_data", "status": "processed"}  # fmt: skip


def parse_json(body):
    """The JSON of a body. Raises `RequestError`."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("The body is not JSON.") from None


def reading_options(form):
    """modality, series and frame of a form."""
    options = {}
    if form.get("modality") not in (None, "", "auto"):
        if form["modality"] not in ("ct", "mr"):
            raise RequestError("modality is auto, ct or mr.", "modality")
        options["modality"] = form["modality"]
    for name in ("series", "frame"):
        if form.get(name) not in (None, ""):
            if not str(form[name]).isascii() or not str(form[name]).isdigit() or len(form[name]) > 6:
                raise RequestError(f"{name} is a whole number.", name)
            options[name] = int(form[name])
    return options


def copy(stream, path):
    """Writes an open file to `path`; returns its bytes."""
    with open(path, "wb") as out:
        while chunk := stream.read(1 << 20):
            out.write(chunk)
        return out.tell()
