"""The hub, played by a server on this machine: what is pushed comes back the same. And GGUF files, read by transformers."""

import base64
import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests.conftest import TEXT
from tests.hf_models import folder, ids
from trainkit import cli
from trainkit.data.learned import LEARNED
from trainkit.data.tokenizers import JsonTokenizer
from trainkit.errors import UserError
from trainkit.export import export
from trainkit.hf import push, source

RUNS = Path("runs")
OID = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as pushing and fetching a model takes."""

    files: dict[str, bytes]
    blobs: dict[str, bytes]
    seen: list[tuple[str, str, str]]
    refuses = False

    def _answer(self, value: Any = None, status: int = 200, content: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value or {}).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        self.seen.append((self.command, self.path, self.headers.get("Authorization", "")))
        return body

    def do_POST(self) -> None:
        body, here = self._body(), f"http://{self.headers['Host']}"
        if self.refuses:
            self._answer({"error": "no"}, 403, X_Error_Message="you may not write here")
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{here}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answers = []
            for name in [file["path"] for file in asked]:
                mode = "lfs" if name.endswith("safetensors") else "regular"
                answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False})
            self._answer({"files": answers})
        elif self.path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            self._answer(
                {"errors": [] if card.startswith("---\nlibrary_name: transformers\n") else [{"message": "no card"}]}
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [{**o, "actions": {"upload": {"href": f"{here}/blob/{o['oid']}"}}} for o in objects]
            self._answer({"transfer": "basic", "objects": links})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.blobs[line["value"]["oid"]]
            self._answer({"commitUrl": f"{here}/me/mine/commit/{OID}", "commitOid": OID, "success": True})
        else:
            self._answer({}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        self.blobs[hashlib.sha256(body).hexdigest()] = body
        self._answer()

    def do_GET(self) -> None:
        self._body()
        if "/tree/" in self.path:
            listed = [{"type": "file", "path": n, "size": len(c), "oid": OID} for n, c in self.files.items()]
            self._answer(content=json.dumps(listed).encode())
            return
        if self.path.startswith("/api/models/"):
            self._answer({"id": "me/mine", "sha": OID, "siblings": [{"rfilename": name} for name in self.files]})
            return
        name = self.path.partition(f"/resolve/{OID}/")[2]
        if name not in self.files:
            self._answer({}, 404, X_Error_Code="EntryNotFound")
            return
        etag = hashlib.sha256(self.files[name]).hexdigest()
        self._answer(content=self.files[name], ETag=f'"{etag}"', X_Repo_Commit=OID)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, place: Path) -> Iterator[type[Hub]]:
    from huggingface_hub import constants

    handler = type("Here", (Hub,), {"files": {}, "blobs": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's own library does not
def test_what_is_pushed_comes_back(hub: type[Hub], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder("llama", place)
    with pytest.raises(SystemExit) as done:
        cli.main(["export", f"hf:{where}", "out", "--push", "me/mine", "--private"])
    assert done.value.code == 0
    assert f"/me/mine/commit/{OID}" in capsys.readouterr().out
    assert hub.files == {p.name: p.read_bytes() for p in (place / "out").iterdir()}
    assert {authorization for method, path, authorization in hub.seen if method == "POST"} == {"Bearer hf_secret"}
    (hub.files["pytorch_model.bin"], hub.files["modeling.py"]) = (b"pickle", b"import os")
    fetched = source.located("me/mine")
    assert not {"pytorch_model.bin", "modeling.py"} & {p.name for p in fetched.iterdir()}
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(w, dtype=torch.float32).eval()(ids()).logits
        for w in (where, fetched)
    )
    assert torch.equal(one, other)
    assert source.identity(fetched).startswith("hf:mine@")


def test_what_the_hub_refuses(hub: type[Hub], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder("llama", place)
    hub.refuses = True
    with pytest.raises(UserError, match=r"out is written, but could not be pushed to me/mine: .*"):
        export(f"hf:{where}", place / "out", RUNS, dtype="fp32", push="me/mine")
    assert (place / "out/config.json").exists()
    with pytest.raises(UserError, match="--push mine is no repository: write OWNER/NAME"):
        export(f"hf:{where}", place / "other", RUNS, dtype="fp32", push="mine")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="--push needs a token that may write: set HF_TOKEN"):
        push.check("me/mine")
    hub.do_HEAD = hub.do_GET = lambda self: self._answer({}, 404)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"me/none is no folder here, and could not be had of the hub: "):
        source.located("me/none")


needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf library is not installed")


@needs_gguf
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "qwen3-wide"])
@pytest.mark.parametrize("form", ["fp32", "q8_0"])
def test_a_gguf_file_holds_the_same_model(kind: str, form: str, place: Path) -> None:
    where = folder(kind, place)
    learned = JsonTokenizer(LEARNED["bpe"](290, [TEXT]), "bpe")
    said = json.loads(learned.text) | {"added_tokens": []}  # type: ignore[attr-defined]  # a JsonTokenizer
    fast = Tokenizer.from_str(json.dumps(said))
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (where / "tokenizer.json").write_text(fast.to_str())
    export(f"hf:{where}", place / "out", RUNS, dtype="fp32", gguf=form)
    file = f"model-{form}.gguf"
    read = transformers.AutoModelForCausalLM.from_pretrained(place / "out", gguf_file=file, dtype=torch.float32).eval()
    expected = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()(ids()).logits
    torch.testing.assert_close(
        read(ids()).logits, expected, rtol=0, atol=1e-4 if form == "fp32" else 0.1 * float(expected.detach().std())
    )
    again = source.located(str(place / "out" / file))
    assert source.config_of(again)["model_type"] == expected_family(kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(again)
    assert (
        tokenizer("Hi <|im_end|>")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(where)("Hi <|im_end|>")["input_ids"]
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template


def expected_family(kind: str) -> str:
    return kind.partition("-")[0]


@needs_gguf
def test_what_a_gguf_file_cannot_be(place: Path) -> None:
    with pytest.raises(UserError, match="--gguf writes llama, qwen2, qwen3 without a window, and this is gpt2"):
        export(f"hf:{folder('gpt2', place)}", place / "out", RUNS, dtype="fp32", gguf="fp32")
    with pytest.raises(UserError, match="no scaled rotary"):
        export(f"hf:{folder('yarn', place)}", place / "out", RUNS, dtype="fp32", gguf="fp32")
    with pytest.raises(UserError, match="tokenizers that merge bytes"):
        export(f"hf:{folder('llama', place)}", place / "out", RUNS, dtype="fp32", gguf="fp32")
    with pytest.raises(UserError, match="--gguf q4 is none"):
        export("hf:gpt2", place / "out", RUNS, dtype="fp32", gguf="q4")
    with pytest.raises(UserError, match="give one of the two"):
        export("hf:gpt2", place / "out", RUNS, dtype="fp32", gguf="fp32", adapter=True)
    assert not (place / "out").exists()
