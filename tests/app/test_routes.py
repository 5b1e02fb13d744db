"""The app's routes without a browser: what a visitor reaches of others, what is refused, what stays on the disk."""

import gzip
import io
import tempfile
import zipfile

import pytest
import SimpleITK as sitk

pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
from starlette.testclient import TestClient  # noqa: E402

from conftest import ROOT  # noqa: E402
from photon.app.page import chat_of, remember  # noqa: E402
from photon.app.scans import sample  # noqa: E402
from photon.app.server import build_app  # noqa: E402
from photon.app.visits import Visits  # noqa: E402
from photon.loading import load  # noqa: E402
from photon.serving.engine import Answer, Engine  # noqa: E402
from photon.serving.incoming import Limits  # noqa: E402
from planted import planted_series, secrets_in  # noqa: E402


@pytest.fixture(scope="module")
def engine():
    engine = Engine(*load(ROOT))
    yield engine
    engine.close()


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """A folder for temporary files that the test looks into."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def client(engine, temp):
    visits = Visits(most=3)
    limits = Limits(upload_bytes=1 << 20, unpacked_bytes=1 << 20)
    with TestClient(build_app(engine, visits, limits, tiny=True), base_url="http://localhost") as client:
        client.visits = visits
        yield client


@pytest.fixture(scope="module")
def nifti(tmp_path_factory):
    file = tmp_path_factory.mktemp("x") / "a.nii.gz"
    sitk.WriteImage(sample(0)[0], str(file))
    return file.read_bytes()


def begin(client):
    return client.post("/photon/visits").json()["visit"]


def files(folder):
    return [file for file in folder.rglob("*") if file.is_file() and "gradio" not in file.parts]


def test_one_visitor_does_not_reach_another(client, nifti, temp):
    first, second = begin(client), begin(client)
    assert first != second and len(first) >= 32
    assert client.post(f"/photon/visits/{first}/scan", content=nifti).json()["kind"] == "CT"
    assert client.get(f"/photon/visits/{first}/scan.json").status_code == 200
    for name in (second, first[:-1], first.lower(), "x", "..", "%2e%2e", "*"):
        for path in ("scan.json", "questions.json", "scan.nii.gz", "kept/0.nii.gz", "page.html"):
            assert client.get(f"/photon/visits/{name}/{path}").status_code == 404, (name, path)
    assert files(temp) == []
    reply = client.get(f"/photon/visits/{first}/scan.json")
    assert reply.headers["cache-control"] == "no-store" and "frame" not in reply.headers.get("set-cookie", "")


def test_tags_of_a_patient_go_nowhere(client, engine, tmp_path, temp, capfd, caplog):
    """Not into a reply, a download, the page to keep, a log or a name on the disk; also where the scan is refused."""
    name, told = begin(client), []
    with caplog.at_level("DEBUG"):
        for number, sound in enumerate((False, True)):
            content = planted_series(tmp_path / str(number), sound)
            reply = client.post(f"/photon/visits/{name}/scan", content=content)
            assert reply.status_code == (200 if sound else 422), reply.text
            told.append(reply.text)
        visit = client.visits.held[name]
        question = "Is there a lesion in the liver?"
        (answer,) = [event for event in engine.ask(chat_of((), question), [visit.scan.encoded])
                     if isinstance(event, Answer)]  # fmt: skip
        remember(engine, visit, question, answer)
        for path in ("scan.json", "questions.json", "page.html", "scan.nii.gz", "kept/0.nii.gz"):
            reply = client.get(f"/photon/visits/{name}/{path}")
            assert reply.status_code == 200
            told += [str(reply.headers), gzip.decompress(reply.content) if path.endswith("gz") else reply.content]
    told += [*capfd.readouterr(), caplog.text, *map(str, temp.rglob("*"))]
    assert secrets_in(*told) == []


def test_the_end_of_a_visit(client, nifti):
    name = begin(client)
    client.post(f"/photon/visits/{name}/scan", content=nifti)
    assert client.get(f"/photon/visits/{name}/scan.nii.gz").status_code == 200
    client.post(f"/photon/visits/{name}/end")
    assert client.get(f"/photon/visits/{name}/scan.nii.gz").status_code == 404
    assert client.post(f"/photon/visits/{name}/scan", content=nifti).status_code == 404
    assert client.visits.held == {}


def test_idle_visits_end(client, nifti):
    name = begin(client)
    client.post(f"/photon/visits/{name}/scan", content=nifti)
    client.visits.held[name].touched -= client.visits.idle + 1
    client.visits.expire()
    assert client.get(f"/photon/visits/{name}/scan.json").status_code == 404


def test_visits_are_limited(client):
    for _ in range(3):
        begin(client)
    reply = client.post("/photon/visits")
    assert reply.status_code == 503 and "try again" in reply.json()["detail"]


@pytest.mark.parametrize("path", [
    "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=https://example.org/", "/proxy=https://example.org", "/gradio_api/stream/x", "/monitoring",
    "/gradio_api/process_recording", "/gradio_api/deep_link", "/gradio_api/vibe-code", "/gradio_api/upload/",
    "/gradio_api/upload_progress", "/gradio_api/component_server", "/gradio_api/file=../../etc/passwd", "/runs",
])  # fmt: skip
def test_gradios_files_are_closed(client, path):
    assert client.get(path).status_code == 404
    assert client.post(path, content=b"x").status_code == 404


@pytest.mark.parametrize(
    "path", ["../server.py", "..%2fserver.py", "app.js/../../server.py", "nothing.js", "%2fetc%2fpasswd"]
)
def test_static_files_are_four(client, path):
    assert client.get(f"/photon/static/{path}").status_code == 404
    assert client.get("/photon/static/app.js").status_code == 200


def test_what_is_too_large(client, temp):
    name = begin(client)
    reply = client.post(f"/photon/visits/{name}/scan", content=bytes((1 << 20) + 1))
    assert reply.status_code == 413 and "limit" in reply.json()["detail"]

    def endless():  # no length is declared
        for _ in range(40):
            yield bytes(1 << 16)

    assert client.post(f"/photon/visits/{name}/scan", content=endless()).status_code == 413
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(64 << 20))
    reply = client.post(f"/photon/visits/{name}/scan", content=bomb.getvalue())
    assert reply.status_code == 422 and reply.json()["code"] == "TOO_LARGE"
    assert client.post(f"/photon/visits/{name}/scan", content=b"").status_code == 422
    assert files(temp) == []


def test_a_refusal_keeps_the_scan_before(client, nifti):
    name = begin(client)
    client.post(f"/photon/visits/{name}/scan", content=nifti)
    refused = client.post(f"/photon/visits/{name}/scan", content=b"no scan").json()
    assert refused["code"] == "NOT_A_SCAN" and refused["message"] and refused["step"]
    assert client.get(f"/photon/visits/{name}/scan.json").status_code == 200
    assert client.post(f"/photon/visits/{name}/scan?modality=pet", content=nifti).status_code == 422


def test_other_hosts_are_refused(client):
    """A page elsewhere whose name points to this machine cannot read the answers."""
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy


def test_no_other_host_is_named_in_what_loads(client):
    page = client.get("/").text
    head = page[: page.index("<script>window.gradio_config")]
    assert "/photon/static/viewer.js" in page and "fonts.googleapis" not in page and "cdn" not in head
