"""Adapters to a hub and back, by its own client and a server in its place."""

import base64
import http.server
import json
import threading

import keras
import pytest
from helpers import run_python

import keras_fvae

pytestmark = pytest.mark.one_backend

# What the client asks of the hub, as much as uploading and downloading takes.


class Hub(http.server.BaseHTTPRequestHandler):
    def answer(self, content, status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body = self.body()
        if self.path == "/api/repos/create":
            name = "user/" + json.loads(body)["name"]
            url = f"http://{self.headers['Host']}/{name}"
            self.answer({"url": url, "id": name, "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(
                        value["content"]
                    )
            url = f"http://{self.headers['Host']}/user/task/commit/{'a' * 40}"
            self.answer(
                {"success": True, "commitUrl": url, "commitOid": "a" * 40}
            )
        else:
            self.answer({})

    def do_GET(self):
        name = self.path.split("/")[-1]
        if "/resolve/" in self.path and name in self.server.files:
            self.answer(
                self.server.files[name], ETag='"1"', X_Repo_Commit="a" * 40
            )
        elif "/resolve/" in self.path:
            self.answer({}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer({"id": "user/task", "sha": "a" * 40, "siblings": []})

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server in the place of the hub, which runs in this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_of_a_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()


MODEL = """
import sys, keras, numpy as np
import keras_fvae

def make_model():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    )
    for weight in model.weights:
        weight.assign(np.ones(weight.shape))
    return model
"""


def test_up_and_down_again(hub, rng, tmp_path):
    run_python(
        "-c",
        MODEL
        + """
model = make_model()
keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
for weight in model.layers[0].adapter.weights:
    weight.assign(np.full(weight.shape, 2.0))
keras_fvae.upload_adapter(model, "hf://user/task", base_model="hf://a/base")
""",
    )
    assert {*hub.files} == {"adapter.safetensors", "README.md"}
    card = hub.files["README.md"].decode()
    assert "base_model: a/base" in card and "- lora" in card
    assert "LoRA of rank 2 on 1 layers, trained" in card
    assert 'download_adapter("hf://user/task")' in card
    output = run_python(
        "-c",
        MODEL
        + """
model = make_model()
path = keras_fvae.download_adapter("hf://user/task")
keras_fvae.load_adapter(model, path, strict=True)
print(float(model(np.ones((1, 4)))[0, 0]))
""",
    ).stdout
    assert float(output) == pytest.approx(4 + 1 + 4 * 2 * 2 * 2)
    # A card that somebody has written stays.
    hub.files["README.md"] = b"ours"
    run_python(
        "-c",
        MODEL
        + """
model = make_model()
keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
keras_fvae.upload_adapter(model, "hf://user/task")
""",
    )
    assert hub.files["README.md"] == b"ours"


def test_what_is_not_there(hub):
    result = run_python(
        "-c",
        'import keras_fvae; keras_fvae.download_adapter("hf://user/no_task")',
        check=False,
    )
    assert "OSError: 'hf://user/no_task' cannot be reached" in result.stderr


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for call in (
        'keras_fvae.download_adapter("hf://user/task")',
        "keras_fvae.enable_adapter(m := make_model(), keras_fvae.LoRAConfig())"
        '; keras_fvae.upload_adapter(m, "hf://user/task")',
    ):
        result = run_python("-c", MODEL + call, check=False)
        assert "OSError: 'hf://user/task' cannot be reached" in result.stderr


@pytest.mark.parametrize(
    "uri", ["user/task", "hf://", "hf://a/b/c", "gs://a/b", None, "hf:///b"]
)
def test_addresses_that_are_none(uri):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    )
    with pytest.raises(ValueError, match="has no adapted layer"):
        keras_fvae.upload_adapter(model, "hf://user/task")
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    for call in (
        lambda: keras_fvae.upload_adapter(model, uri),
        lambda: keras_fvae.download_adapter(uri),
    ):
        with pytest.raises(ValueError, match="`uri` must name a repository"):
            call()
