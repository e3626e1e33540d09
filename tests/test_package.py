"""Packaging: the card, checksums that the system's own tool accepts, and a push to a stand-in for the Hub."""

import base64
import json
import logging
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_report import result, run_folder  # noqa: F401 - a fixture

from compressor import report
from compressor.errors import CheckFailed, UserError
from compressor.package import CHECKSUMS, check_checksums, licence_of, push, write_card, write_checksums

TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def student(tmp_path):
    """Packing reads files as bytes: any folder will do."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_card_tells_what_it_is_and_parses_as_a_model_card(run_folder, student):  # noqa: F811
    from huggingface_hub import ModelCard

    written = report.write(run_folder)
    path = write_card(student, report=written, teacher="owner/teacher-8b", recipe="target: 50%\n", licence="apache-2.0")
    card = ModelCard.load(path)
    assert card.data.base_model == "owner/teacher-8b"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    for words in ("from_pretrained", "| rag |", "target: 50%", "95 % bootstrap", "97.9 %"):
        assert words in card.text, words
    local = ModelCard.load(write_card(student, report=written, teacher="demo"))
    assert local.data.base_model is None


def test_the_licence_comes_from_the_teachers_card(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\n---\n# A teacher\n")
    assert licence_of(tmp_path) == "llama3.1"
    for silent in (
        "# No front matter\n",
        "---\nlicense: [a, b]\n---\n",
        "---\n{broken\n---\n",
        "---\ntags: [x]\n---\n",
    ):
        (tmp_path / "README.md").write_text(silent)
        assert licence_of(tmp_path) is None


def test_checksums_satisfy_sha256sum_and_catch_a_changed_byte(student):
    write_checksums(student)
    files = [f for f in student.iterdir() if f.name != CHECKSUMS]
    assert check_checksums(student) == len(files)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", CHECKSUMS], cwd=student, check=True)
    weights = student / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (student / "config.json").unlink()
    with pytest.raises(CheckFailed, match=r"config\.json, model\.safetensors missing or changed"):
        check_checksums(student)


def test_a_folder_without_files_or_checksums_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no files"):
        write_checksums(tmp_path)
    with pytest.raises(UserError, match="has no SHA256SUMS"):
        check_checksums(tmp_path)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push of small files needs; `state` says how it behaves and keeps what came."""

    state: dict

    def log_message(self, *_):
        pass

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"id": "me/student", "private": self.state["private"], "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state["tokens"].add(self.headers.get("Authorization"))
        url = f"http://{self.headers['Host']}/me/student"
        if self.state.get("refuse"):
            self.answer({"error": f"bad token {self.state['refuse']}"}, status=401)
        elif self.path.endswith("/repos/create"):
            self.state["created"] = json.loads(body)
            self.answer({"url": url, "name": "me/student", "id": "me/student"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.state["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
        else:
            self.answer({}, status=200)


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    huggingface_hub.close_session()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    state = {"private": True, "tokens": set(), "files": {}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    yield endpoint, state
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def visibility(state: dict) -> str:
    """What create_repo asked for; older clients say it with a flag."""
    created = state["created"]
    return created.get("visibility") or ("private" if created["private"] else "public")


def test_a_push_sends_every_file_privately_and_tells_no_one_the_token(student, hub, caplog, capfd):
    endpoint, state = hub
    write_checksums(student)
    (student / ".hidden").write_text("stays here")
    with caplog.at_level(logging.DEBUG):
        address = push(student, "me/student", token=TOKEN)
    assert address == f"{endpoint}/me/student"
    assert visibility(state) == "private"
    assert state["tokens"] == {f"Bearer {TOKEN}"}
    sent = {f.name: f.read_bytes() for f in student.iterdir() if f.is_file() and f.name != ".hidden"}
    assert state["files"] == sent
    out = capfd.readouterr()
    assert TOKEN not in caplog.text + out.out + out.err + "".join(map(str, state["files"]))


def test_a_private_push_never_lands_in_a_public_repository(student, hub):
    _, state = hub
    state["private"] = False
    write_checksums(student)
    with pytest.raises(UserError, match="is public"):
        push(student, "me/student", token=TOKEN)
    assert state["files"] == {}
    push(student, "me/student", private=False, token=TOKEN)
    assert visibility(state) == "public"
    assert state["files"]


def test_a_refusal_is_one_line_without_the_token(student, hub, monkeypatch):
    import huggingface_hub

    _, state = hub
    state["refuse"] = TOKEN
    write_checksums(student)
    with pytest.raises(UserError, match="could not push to me/student") as raised:
        push(student, "me/student", token=TOKEN)
    assert TOKEN not in str(raised.value)
    assert "bad token ***" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="could not push"):
        push(student, "not a name", token=TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(UserError, match="could not push"):
        push(student, "me/student", token=TOKEN)


def test_changed_files_are_not_pushed(student, hub):
    _, state = hub
    write_checksums(student)
    (student / "config.json").write_text("{}")
    with pytest.raises(CheckFailed):
        push(student, "me/student", token=TOKEN)
    assert state["files"] == {}
