"""The server: the official client, tokens, limits, bad requests, clients that leave, batches, a kill and a restart."""

import asyncio
import json
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

import pytest
import SimpleITK as sitk

httpx = pytest.importorskip("httpx", reason="pip install -r requirements-serve.txt openai")
openai = pytest.importorskip("openai", reason="pip install openai")
pytest.importorskip("prometheus_client", reason="pip install -r requirements-serve.txt")

from conftest import ROOT, TOKENS, real  # noqa: E402
from photon import asking  # noqa: E402
from photon.app.scans import sample  # noqa: E402
from photon.loading import load  # noqa: E402
from photon.serving.access import Tokens  # noqa: E402
from planted import planted_series, secrets_in  # noqa: E402
from running import running  # noqa: E402

MINE, OTHERS = "first-token-of-the-tests", "second-token-of-the-tests"
QUESTION = "Is there a lesion in the liver?"
ORGANS = ("liver", "spleen", "left kidney", "right lung", "right kidney", "left lung")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The server's folder of scans, with a link out of it and a neighbour."""
    place = tmp_path_factory.mktemp("served")
    scans = place / "scans"
    scans.mkdir()
    sitk.WriteImage(sample(1)[0], str(scans / "one.nii.gz"))
    shutil.copy(scans / "one.nii.gz", place / "secret.nii.gz")
    (scans / "link.nii.gz").symlink_to(place / "secret.nii.gz")
    return scans


@pytest.fixture(scope="module")
def server(tmp_path_factory, folder):
    with running("photon.serving", tmp_path_factory.mktemp("serving"), "--folder", folder, "--max-waiting", 48,
                 "--max-upload", 4, PHOTON_TOKENS=f"{MINE},{OTHERS}") as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    file = tmp_path_factory.mktemp("x") / "doe_jane_19700101.nii.gz"
    sitk.WriteImage(sample(0)[0], str(file))
    return file


def client_of(server, token=MINE):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def raw(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {MINE}"}, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def file_id(client, scan):
    with open(scan, "rb") as stream:
        return client.files.create(file=stream, purpose="user_data").id


def messages(scan, question=QUESTION):
    part = {"type": "volume", "file_id": scan} if isinstance(scan, str) else scan
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


def body(scan, **more):
    return {"model": "photon", "messages": messages(scan)} | more


# === The official client =============================================================================================


def test_the_official_client(client, scan, file_id):
    assert [model.id for model in client.models.list()] == ["photon"]
    assert client.models.retrieve("photon").object == "model"
    result, *_ = asking.ask(*load(ROOT), [str(scan)], QUESTION)
    reply = client.chat.completions.create(model="photon", messages=messages(file_id))
    assert reply.choices[0].message.content == result["answer"] and reply.choices[0].finish_reason == "stop"
    assert reply.photon["tokens_kept"] == result["tokens_kept"] and reply.photon["tokens_seen"] == TOKENS
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > TOKENS
    stream = client.chat.completions.create(
        model="photon", messages=messages({"type": "file", "file": {"file_id": file_id}}), stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == result["answer"]
    assert chunks[-1].usage.total_tokens == reply.usage.total_tokens and chunks[-2].choices[0].finish_reason == "stop"
    again = [{"role": "system", "content": "Answer in one word."}, *messages(file_id),
             {"role": "assistant", "content": "yes"}, {"role": "user", "content": "And in the spleen?"}]  # fmt: skip
    assert client.chat.completions.create(model="photon", messages=again).photon["tokens_seen"] == TOKENS


def test_what_is_kept_and_sampled(client, file_id):
    def ask(**more):
        return client.chat.completions.create(model="photon", messages=messages(file_id), **more)

    assert ask(extra_body={"token_budget": 9}).photon["tokens_kept"] == 9
    assert ask(extra_body={"keep_ratio": 0.1}).photon["tokens_kept"] == 42
    assert ask(extra_body={"use_scheduler": False}).photon["tokens_kept"] == TOKENS
    assert ask().photon["grounding"] is None and ask(extra_body={"grounding": True}).photon["grounding"]
    texts = {ask(temperature=2.0, seed=7, max_tokens=8).choices[0].message.content for _ in range(2)}
    assert len(texts) == 1  # the same seed


def test_files_of_a_token(server, client, scan, file_id):
    listed = [file.id for file in client.files.list()]
    assert file_id in listed and client.files.retrieve(file_id).filename == "scan"  # not the patient's name
    other = client_of(server, OTHERS)
    assert list(other.files.list()) == []
    for attempt in (
        lambda: other.files.retrieve(file_id),
        lambda: other.files.delete(file_id),
        lambda: other.chat.completions.create(model="photon", messages=messages(file_id)),
    ):
        with pytest.raises(openai.NotFoundError):
            attempt()
    with open(scan, "rb") as stream:
        gone = client.files.create(file=stream, purpose="user_data").id
    assert gone != file_id and client.files.delete(gone).deleted
    with pytest.raises(openai.NotFoundError, match="Upload it again"):
        client.chat.completions.create(model="photon", messages=messages(gone))
    assert client.files.retrieve(file_id).id == file_id


def test_a_scan_is_encoded_once(client, raw, scan, file_id):
    """The same content again, under another name, and the folder's scan again, are not encoded again."""

    def held():
        return float(raw.get("/metrics").text.split("\nphoton_scans ")[1].split("\n")[0])

    before = held()
    with open(scan, "rb") as stream:
        client.files.create(file=("other.nii.gz", stream), purpose="user_data")
    assert held() == before
    for _ in range(2):
        client.chat.completions.create(model="photon", messages=messages({"type": "volume", "path": "one.nii.gz"}))
    assert held() == before + 1


def test_a_refused_scan_says_why(client, tmp_path):
    sitk.WriteImage(sitk.Image(20, 21, 22, sitk.sitkInt16), str(tmp_path / "a.nii.gz"))
    for content, code in [((tmp_path / "a.nii.gz").read_bytes(), "CONSTANT_IMAGE"), (b"hello", "NOT_A_SCAN")]:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.files.create(file=("doe_jane.nii.gz", content), purpose="user_data")
        assert refused.value.code == code and "doe_jane" not in str(refused.value)


def test_tags_of_a_patient_go_nowhere(server, raw, tmp_path):
    """Not into a reply, a metric, the log or a name on the disk; also where the scan is refused."""
    told = []
    for number, status in enumerate((422, 200)):
        content = planted_series(tmp_path / str(number), sound=status == 200)
        reply = raw.post("/v1/files", files={"file": ("Zzyzx.zip", content)})
        assert reply.status_code == status, reply.text
        told.append(reply.text)
    told += [raw.post("/v1/chat/completions", json=body(reply.json()["id"])).text]
    told += [raw.get(path).text for path in ("/v1/files", "/metrics")]
    assert secrets_in(*told, server.log(), *map(str, server.temp.rglob("*"))) == []


def test_only_this_machine_reaches_it(server):
    """It listens on 127.0.0.1, and on no other address of this machine."""
    socket.create_connection(("127.0.0.1", server.port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=10).close()


def test_an_mr_scan(raw):
    content = real("example_mr_sm.nii.gz").read_bytes()
    assert raw.post("/v1/files", files={"file": ("a", content)}).json()["error"]["code"] == "MODALITY_UNKNOWN"
    name = raw.post("/v1/files", files={"file": ("a", content)}, data={"modality": "mr"}).json()["id"]
    assert raw.post("/v1/chat/completions", json=body(name)).status_code == 200


# === Who may ask =====================================================================================================


@pytest.mark.parametrize("header", [
    None, "", "Bearer", f"Bearer {MINE[:-1]}", f"Bearer {MINE}x", f"Basic {MINE}", MINE, f"bearer\t{MINE}",
    f"Bearer {MINE.upper()}", f"Bearer {MINE},{OTHERS}",
])  # fmt: skip
def test_nobody_without_the_token(server, header):
    headers = {} if header is None else {"Authorization": header}
    for method, path in [("GET", "/v1/models"), ("POST", "/v1/files"), ("POST", "/v1/chat/completions"),
                         ("GET", "/metrics"), ("GET", "/v1/files"), ("GET", "/nothing")]:  # fmt: skip
        reply = httpx.request(method, server.url + path, headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "no_token", path
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_tokens_take_equal_time():
    """Right and wrong, long and short: the comparison of digests takes the same time, within the clock's noise."""
    tokens = Tokens(["a" * 40, "b" * 40])
    headers = ("Bearer " + "a" * 40, "Bearer " + "b" * 40, "Bearer " + "a" * 39 + "x", "Bearer x" + "a" * 39)
    times = {header: [] for header in headers}
    for _ in range(3000):
        for header in headers:  # in turn, since the machine's speed changes
            start = time.perf_counter_ns()
            tokens.owner(header)
            times[header].append(time.perf_counter_ns() - start)
    medians = [statistics.median(taken) for taken in times.values()]
    assert max(medians) < 1.5 * min(medians)
    assert [tokens.owner(f"Bearer {t * 40}") for t in "abc"] == [0, 1, None]
    with pytest.raises(ValueError, match="16 characters"):
        Tokens(["short"])
    made = Tokens()
    assert made.owner(f"Bearer {made.made}") == 0 and len(made.made) >= 32


# === Bad requests ====================================================================================================


@pytest.mark.parametrize(("change", "param", "status"), [
    ({"model": "gpt-4"}, "model", 404),
    ({"messages": []}, "messages", 400),
    ({"messages": "hello"}, "messages", 400),
    ({"messages": [{"role": "user", "content": "no scan"}]}, "messages", 400),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", 400),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", 400),
    ({"messages": [{"role": "user", "content": [{"type": "volume"}]}]}, "messages[0].content[0]", 400),
    ({"messages": [{"role": "user", "content": [{"type": "volume", "file_id": 3}]}]}, "messages[0].content[0]", 400),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]}, None, 400),
    ({"messages": [{"role": "user", "content": "x" * 20_001}]}, "messages[0].content", 400),
    ({"max_tokens": 0}, "max_completion_tokens", 400),
    ({"max_tokens": True}, "max_completion_tokens", 400),
    ({"temperature": "hot"}, "temperature", 400),
    ({"token_budget": 3, "keep_ratio": 0.5}, "token_budget", 400),
    ({"keep_ratio": 1.5}, "keep_ratio", 400),
    ({"stop": ["a"] * 5}, "stop", 400),
    ({"n": 2}, "n", 400),
    ({"tools": [{}]}, "tools", 400),
    ({"stream": "yes"}, "stream", 400),
])  # fmt: skip
def test_bad_fields_are_named(raw, file_id, change, param, status):
    reply = raw.post("/v1/chat/completions", json=body(file_id) | change)
    error = reply.json()["error"]
    assert reply.status_code == status and error["message"] and (param is None or error["param"] == param)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"model": NaN}'])
def test_malformed_bodies(raw, content):
    reply = raw.post("/v1/chat/completions", content=content)
    assert reply.status_code in (400, 404) and reply.json()["error"]["message"]


@pytest.mark.parametrize("path", [
    "../secret.nii.gz", "link.nii.gz", "/etc/passwd", "one.nii.gz/../../secret.nii.gz", ".", "", "nothing.nii.gz",
    "one.nii.gz\0", "..", "a" * 1001, "~/one.nii.gz",
])  # fmt: skip
def test_paths_stay_in_the_folder(raw, path):
    """Outside and missing look the same."""
    reply = raw.post("/v1/chat/completions", json=body({"type": "volume", "path": path}))
    assert reply.status_code in (400, 422)
    if reply.status_code == 422:
        assert reply.json()["error"]["message"].startswith(
            "[NO_SUCH_FILE] There is no such scan in the server's folder"
        )


def test_oversized_bodies(server, raw, file_id):
    assert raw.post("/v1/chat/completions", content=bytes((1 << 20) + 1)).status_code == 413
    assert raw.post("/v1/files", files={"file": ("a", bytes(5 << 20))}).status_code == 413

    def endless():
        for _ in range(200):
            yield bytes(1 << 16)

    assert raw.post("/v1/chat/completions", content=endless()).status_code == 413  # no length is declared
    for form in ({"other": ("a", b"x")}, {"file": ("a", b"x"), "file2": ("b", b"x")}):
        assert raw.post("/v1/files", files=form).status_code == 400
    assert raw.post("/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    assert raw.post("/v1/files", files={"file": ("a", b"x")}, data={"series": "one"}).status_code == 400
    assert raw.post("/v1/chat/completions", json=body(file_id)).status_code == 200


def test_broken_http(server, raw):
    """Garbage, half a request, a lie about the length: the next request is answered."""
    post = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Le"
    for text in (b"GARBAGE\r\n\r\n", post + b"ngth: -5\r\n\r\n", b"GET /" + b"a" * 100_000, post):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
            line.sendall(text)
    assert raw.get("/health").status_code == 200


# === Many at a time ==================================================================================================


async def many(server, count, request, token=MINE):
    """Replies to `count` requests at the same time."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, headers={"Authorization": f"Bearer {token}"}, timeout=180, limits=limits
    ) as client:
        return await asyncio.gather(*(request(client, number) for number in range(count)))


def test_questions_on_one_scan_are_batched(server, raw, file_id):
    def question(number):
        return f"Is there a lesion in the {ORGANS[number % len(ORGANS)]}?"

    async def ask(client, number):
        return await client.post(
            "/v1/chat/completions", json=body(file_id) | {"messages": messages(file_id, question(number))}
        )

    replies = asyncio.run(many(server, 24, ask))
    assert all(reply.status_code == 200 for reply in replies)
    assert max(reply.json()["photon"]["batch"] for reply in replies) > 4
    for number in range(len(ORGANS)):  # and each got its own answer
        alone = raw.post(
            "/v1/chat/completions", json=body(file_id) | {"messages": messages(file_id, question(number))}
        ).json()
        for reply in replies[number :: len(ORGANS)]:
            assert reply.json()["choices"][0]["message"] == alone["choices"][0]["message"]
            assert reply.json()["photon"]["tokens_kept"] == alone["photon"]["tokens_kept"]


def test_too_many_are_told(server, file_id):
    async def ask(client, number):
        return await client.post("/v1/chat/completions", json=body(file_id, keep_ratio=(number + 1) / 200))

    replies = asyncio.run(many(server, 80, ask))  # each with settings of its own, so that none fits another
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 48
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "busy"


def test_a_client_that_hangs_up(server, raw, file_id):
    """What nobody waits for is not answered: the queue behind it is empty soon, and the count tells.

    Most of those who leave are counted; the others' answers were complete at that moment.
    """

    def left():
        return float(raw.get("/metrics").text.split("\nphoton_hung_up_total ")[1].split("\n")[0])

    before = left()

    async def leave(client, number):
        try:
            await client.post("/v1/chat/completions", json=body(file_id, keep_ratio=0.5 + number / 100), timeout=0.1)
        except httpx.ReadTimeout:
            return True
        except httpx.TimeoutException:  # before it was sent
            return None

    gone = asyncio.run(many(server, 40, leave)).count(True)
    assert gone >= 10
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body(file_id, stream=True),
                      headers={"Authorization": f"Bearer {MINE}"}, timeout=60) as stream:  # fmt: skip
        next(stream.iter_bytes())  # and away
    end = time.monotonic() + 60
    while left() < before + gone / 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert left() >= before + gone / 2
    assert raw.post("/v1/chat/completions", json=body(file_id)).status_code == 200


def test_metrics(raw, file_id):
    raw.post("/v1/chat/completions", json=body(file_id))
    text = raw.get("/metrics").text
    for name in ("requests_total", "answer_seconds_bucket", "first_token_seconds", "kept_share", "batch_size",
                 "waiting", "scans", "scan_bytes", "answer_tokens_total"):  # fmt: skip
        assert f"photon_{name}" in text, name
    assert 'route="/v1/chat/completions",status="200"' in text and "doe_jane" not in text and file_id not in text


def test_nothing_stays(server, raw, scan, file_id):
    """No upload on the disk, no name or token in the log."""
    assert server.left_on_disk() == []
    log = server.log()
    assert "doe_jane" not in log and MINE not in log and file_id not in log and "Traceback" not in log


def test_a_kill_and_a_restart(tmp_path, scan):
    """Killed while it reads an upload; the next start clears the disk, and does not know the files of before."""
    with running("photon.serving", tmp_path, PHOTON_TOKENS=MINE) as server:
        client = client_of(server)
        with open(scan, "rb") as stream:
            name = client.files.create(file=stream, purpose="user_data").id
        left = server.temp / f"photon-upload-{server.process.pid}-x"
        left.mkdir()
        (left / "upload").write_bytes(b"half a scan")
        server.stop(signal.SIGKILL)
        assert left.exists()
        server.start()
        assert server.left_on_disk() == []
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="photon", messages=messages(name))
        with open(scan, "rb") as stream:
            name = client.files.create(file=stream, purpose="user_data").id
        assert client.chat.completions.create(model="photon", messages=messages(name)).choices


def test_a_token_is_made_where_none_is_given(tmp_path):
    with running("photon.serving", tmp_path, PHOTON_TOKENS="") as server:
        token = server.log().split("Token: ")[1].split()[0]
        assert client_of(server, token).models.list().data[0].id == "photon"
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert json.loads(httpx.get(f"{server.url}/v1/models").text)["error"]["code"] == "no_token"


def test_the_load_test(tmp_path):
    """Its short form: every kind of request gets what it deserves, and nothing is left."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "serving.py"),
        "--preset",
        "smoke",
        "--json",
        str(tmp_path / "a"),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "a").read_text())
    assert result["ratios"]["wrong_replies"] == 0 and result["ratios"]["memory_end_over_first_quarter"] < 1.2
