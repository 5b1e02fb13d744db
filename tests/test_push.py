"""What goes to the Hub: a clean folder that loads elsewhere, a card with the runs' figures, a listing before that.

The Hub is a stand-in on this machine.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from conftest import ROOT, run_fresh
from photon.publishing.card import CardFacts, model_card
from photon.publishing.folder import SETTINGS, WEIGHTS, code_files
from photon.publishing.space import build_space
from scripts import push
from scripts.demo import scans

BASE = "Qwen/Qwen2.5-VL-3B-Instruct"
SCORES = {
    "benchmark": "jsonl", "questions": 80, "refused": {}, "kept": {"mean": 0.115, "min": 0.02, "max": 0.4},
    "scores": {
        "resampling": {"resamples": 1000, "seed": 0, "unit": "patient", "interval": 0.95},
        "tasks": {
            "presence": {
                "questions": 80, "patients": 20,
                "figures": {"accuracy_macro": {"value": 0.9125, "low": 0.85, "high": 0.96}},
                "baselines": [{"name": "one letter", "accuracy_macro": 0.5}, {"name": "text", "accuracy_macro": 0.55}],
            },
            "size": {
                "questions": 40, "patients": 18,
                "figures": {"exact_match": {"value": 0.25, "low": None, "high": None}},
            },
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the root's model, with things beside it that must not go out."""
    folder = tmp_path_factory.mktemp("model") / "final"
    folder.mkdir()
    for name in [*SETTINGS, *WEIGHTS]:
        for file in ROOT.glob(name):
            shutil.copy(file, folder)
    for name in ("doe_jane.nii.gz", "training_args.bin", "optimizer.pt", ".env", "events.log", "predictions.jsonl"):
        (folder / name).write_bytes(b"secret")
    config = json.loads((folder / "config.json").read_text())
    config.pop("auto_map"), config.pop("custom_pipelines")
    config["_name_or_path"] = "/home/doe/model"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "answers"
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps(SCORES))
    (folder / "run.json").write_text(json.dumps({"scheduler": "on", "model": "x"}))
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "run.json").write_text(json.dumps({"stage": "tune", "learning_rate": 1e-5, "model": "/home/doe/base",
                                                 "rows": "abc", "bf16": True, "max_steps": None}))  # fmt: skip
    return folder


def arguments(model, run, training, *more):
    return [str(model), "--repo", "me/my-photon", "--licence", "cc-by-nc-sa-4.0", "--base-model", BASE,
            "--training-data", "9,000 CT, not public.", "--training", str(training), "--results", str(run),
            *map(str, more)]  # fmt: skip


@pytest.fixture(scope="module")
def built(model, run, training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "folder"
    push.main(arguments(model, run, training, "--dry-run", "--build", folder))
    return folder


# === The folder ======================================================================================================


def test_only_what_belongs_there(built):
    names = {file.name for file in built.iterdir()}
    code = {file.name for file in code_files()}
    settings = {name for name in SETTINGS if (ROOT / name).is_file()}
    assert names == code | settings | {"model.safetensors", "README.md", "LICENSE", "NOTICE", "requirements.txt"}
    assert {"pipeline_photon.py", "modeling_photon.py"} < code and "convert_photon.py" not in names
    text = "".join(file.read_text("utf-8") for file in built.iterdir() if file.suffix in (".json", ".md"))
    assert "/home/doe" not in text and "doe_jane" not in text


def test_the_folder_loads_elsewhere(built, tmp_path):
    """In a process that does not see this repository: model, processor, pipeline; the answer is the root's."""
    (tmp_path / "demo").mkdir()
    scans(tmp_path / "demo")
    code = """
import sys, json
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
ask = pipeline("volume-question-answering", model=sys.argv[1], trust_remote_code=True)
answer = ask(sys.argv[2], "Is there a lesion in the liver?")
print(json.dumps([type(model).__name__, type(processor).__name__, answer]))
"""
    scan = tmp_path / "demo" / "phantom.nii.gz"
    kinds, root = (json.loads(run_fresh(code, folder, scan).splitlines()[-1]) for folder in (built, ROOT))
    assert kinds == root and kinds[0] == "PhotonForConditionalGeneration" and kinds[2]["answer"] == "yes"


def test_imports_are_in_the_requirements(built):
    """What the shipped code imports outside of try is named in requirements.txt."""
    listed = {re.split(r"[<>=\[ ]", line)[0].lower() for line in (built / "requirements.txt").read_text().splitlines()}
    needed = set()
    for file in built.glob("*.py"):
        text = re.sub(r"\ntry:.*?\nexcept", "\nexcept", file.read_text("utf-8"), flags=re.S)
        needed |= set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
    needed -= set(sys.stdlib_module_names)
    assert needed <= listed, needed - listed


# === The card ========================================================================================================


def test_the_card(built):
    card = ModelCard.load(built / "README.md")
    data = card.data
    assert data.license == "cc-by-nc-sa-4.0" and data.base_model == BASE
    assert data.library_name == "transformers" and "custom_code" in data.tags
    first, second = data.eval_results
    assert (first.metric_type, first.metric_value, first.metric_args) == (
        "accuracy",
        0.9125,
        {"interval_95": [0.85, 0.96]},
    )
    assert first.dataset_name == "jsonl: presence" and second.metric_args is None
    text = card.text
    assert "0.912 (0.850 to 0.960) | 0.550 | 11.5 %" in text  # with the best answer without the scan
    assert "9,000 CT, not public." in text and "| learning rate | 1e-05 |" in text and "max steps" not in text
    assert "Not a medical device" in text and "me/my-photon" in text and "before the first decoder layer" in text


def test_a_card_without_runs(model):
    text = model_card(model, CardFacts("me/x", "apache-2.0"))
    assert "No evaluation is given" in text and "not described" in text and "model-index" not in text


# === Refusals ========================================================================================================


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "no model*.safetensors"),
    (lambda f: (f / "processor_config.json").unlink(), "lacks processor_config.json"),
    (lambda f: (f / "generation_config.json").write_text('{"x": "/home/doe/y"}'), "names a folder of this machine"),
])  # fmt: skip
def test_incomplete_folders(model, tmp_path, capsys, change, message):
    folder = shutil.copytree(model, tmp_path / "model")
    change(folder)
    with pytest.raises(SystemExit) as stopped:
        push.main([str(folder), "--repo", "me/x", "--licence", "apache-2.0", "--dry-run"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["MODEL", "--repo", "me/x"], "--licence is needed"),
    (["MODEL", "--repo", "x", "--licence", "mit"], "owner/name"),
    (["--repo", "me/x"], "or --space"),
    (["MODEL", "--space", "--repo", "me/x"], "or --space"),
    (["MODEL", "--repo", "me/x", "--licence", "mit", "--build", "MODEL"], "exists"),
    (["MODEL", "--repo", "me/x", "--licence", "mit", "--results", "MODEL"], "no scores.json"),
])  # fmt: skip
def test_errors_say_what_to_do(model, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        push.main([str(model) if word == "MODEL" else word for word in words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# === The stand-in for the Hub ========================================================================================


class StandIn(BaseHTTPRequestHandler):
    """The part of the Hub's API that a push uses. `server.state` holds what came."""

    def log_message(self, *words):
        pass

    def reply(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        state = self.server.state
        state["tokens"].add(self.headers.get("Authorization"))
        if self.path.startswith("/api/") and "/tree/" in self.path:
            return self.reply([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in state["held"]])
        self.reply({"id": state["repo"], "sha": "0" * 40, "siblings": [{"rfilename": name} for name in state["held"]]})

    def do_POST(self):
        state, content = self.server.state, self.body()
        state["tokens"].add(self.headers.get("Authorization"))
        if state["status"] != 200:
            return self.reply({"error": "no"}, state["status"])
        if self.path == "/api/repos/create":
            sent = json.loads(content)
            state["created"] = sent
            return self.reply({"url": f"{self.server.url}/me/{sent['name']}", "name": f"me/{sent['name']}"})
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = []
            for file in files:
                mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
                modes.append({"path": file["path"], "shouldIgnore": False, "oid": None, "uploadMode": mode})
            return self.reply({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            put = [{"oid": item["oid"], "size": item["size"], "actions":
                    {"upload": {"href": f"{self.server.url}/put/{item['oid']}"}}} for item in objects]  # fmt: skip
            return self.reply({"transfer": "basic", "objects": put})
        if "/commit/" in self.path:
            for line in content.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    state["files"][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                if item["key"] == "lfsFile":
                    state["files"][item["value"]["path"]] = state["objects"][item["value"]["oid"]]
                if item["key"] == "deletedFile":
                    state["deleted"].append(item["value"]["path"])
            return self.reply(
                {
                    "commitUrl": f"{self.server.url}/me/my-photon/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "success": True,
                }
            )
        self.reply({})

    def do_PUT(self):
        content = self.body()
        self.server.state["objects"][hashlib.sha256(content).hexdigest()] = content
        self.reply({})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.state = {"files": {}, "objects": {}, "deleted": [], "held": ["old.bin", "README.md"], "tokens": set(),
                    "status": 200, "repo": "me/my-photon", "created": None}  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push_to(hub, *words):
    """The command in a process of its own, whose Hub is the stand-in."""
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_TELEMETRY": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "push.py"), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def test_a_push_sends_what_the_dry_run_lists(hub, model, run, training):
    words = arguments(model, run, training)
    listed = push_to(hub, *words, "--dry-run")
    assert listed.returncode == 0 and "Nothing was sent." in listed.stdout and not hub.state["files"], listed.stderr
    assert hub.state["created"] is None and not hub.state["tokens"]
    sent = push_to(hub, *words, "--private")
    assert sent.returncode == 0, sent.stderr
    created = hub.state["created"]
    assert created["name"] == "my-photon"
    assert created.get("visibility") == "private" or created["private"] is True
    assert hub.state["tokens"] == {"Bearer hf_test"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in hub.state["files"].items()}
    lines = [line.split() for line in listed.stdout.splitlines() if re.match(r"[0-9a-f]{64} ", line)]
    assert digests == {name: digest for digest, _, name in lines} and len(lines) > 20
    assert hub.state["deleted"] == ["old.bin"]  # what was there before does not stay beside it


@pytest.mark.parametrize(
    ("status", "message"), [(401, "hf auth login"), (403, "may not write"), (500, "Try again later")]
)
def test_a_refusal_of_the_hub(hub, model, run, training, status, message):
    hub.state["status"] = status
    sent = push_to(hub, *arguments(model, run, training))
    assert sent.returncode == 2 and message in sent.stderr and "Traceback" not in sent.stderr
    assert "hf_test" not in sent.stderr


# === The Space =======================================================================================================


def test_the_space(tmp_path, monkeypatch):
    from photon.publishing import space

    bundle = tmp_path / "bundle.js"
    bundle.write_text("export const Niivue = 1;")
    monkeypatch.setattr(space, "niivue_bundle", lambda: bundle)
    folder = build_space(tmp_path / "space")
    head = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text("utf-8"), re.S)[1]
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert fields["sdk"] == "gradio" and (folder / fields["app_file"]).is_file()
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"gradio=={fields['sdk_version']}\n" in constraints  # the version that the tests passed with
    requirements = (folder / "requirements.txt").read_text()
    assert "-r " not in requirements and "gradio" in requirements and "torch" in requirements
    assert (folder / "photon" / "app" / "niivue.js").read_text() == bundle.read_text()
    assert not any("node_modules" in file.parts or file.suffix == ".pyc" for file in folder.rglob("*"))
    monkeypatch.setattr(space, "niivue_bundle", lambda: None)
    with pytest.raises(ValueError, match="npm ci"):
        build_space(tmp_path / "other")
