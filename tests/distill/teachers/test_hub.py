"""Without a network timm's weights are refused at once; a slow or faulty host is left to the download."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from robx.distill.teachers.hub import require_hub
from robx.distill.teachers.load import load_teacher
from robx.distill.training.initial import open_initial
from robx.errors import InputError

CONFIG: Any = SimpleNamespace(hf_hub_id="timm/test_resnet.r160_in1k", hf_hub_filename=None)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_error_comes_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the weights of test_resnet\.r160_in1k cannot be downloaded \(.+\): get them"
    ):
        load_teacher("timm:test_resnet.r160_in1k", objective="kd", cache=tmp_path)
    # Of a size that the network is not published for, which was tried twice.
    with pytest.raises(InputError, match=r"timm's weights of vit_tiny_patch16_224 are not available"):
        open_initial(Path("pretrained"), "vit_tiny_patch16_224", image_size=64, cache=tmp_path)


@pytest.mark.usefixtures("no_network")
def test_weights_in_the_cache_need_no_network(tmp_path: Path) -> None:
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    with pytest.raises(Exception, match="name resolution"):
        require_hub(CONFIG, tmp_path)
    (folder / "snapshots" / ("0" * 40) / "model.safetensors").touch()
    require_hub(CONFIG, tmp_path)
    require_hub(SimpleNamespace(hf_hub_id=None), tmp_path / "other")
    require_hub(None, tmp_path / "other")


@pytest.fixture
def server() -> Iterator[str]:
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(503 if "busy" in self.path else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize("path", ["busy", "missing"])
def test_a_host_that_answers_is_left_to_the_download(
    server: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda **_: f"{server}/{path}")
    require_hub(CONFIG, tmp_path)


def test_a_slow_answer_is_left_to_the_download_and_a_refused_connection_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/slow"
        ask = huggingface_hub.get_hf_file_metadata
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: ask(url, timeout=0.2))
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda **_: address)
        require_hub(CONFIG, tmp_path)
    with pytest.raises(Exception, match=r"(?i)refused"):
        require_hub(CONFIG, tmp_path)
