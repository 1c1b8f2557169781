"""Messages to whoever does not watch: sent to a real address on this machine, and never in a run's way."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL
from trainkit import build
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.notify import Notifier

pytest.importorskip("apprise", reason="needs apprise: pip install 'trainkit[notify]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # apprise's own, of Python's imghdr


@pytest.fixture
def service() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Something that takes JSON, its address, and what it was sent."""
    sent: list[dict[str, str]] = []

    class Takes(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Takes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://127.0.0.1:{server.server_port}/hook", sent
        server.shutdown()


def fit(*overrides: str) -> None:
    run = runs.composed([*SMALL, "evaluation.every=3", "evaluation.sample_tokens=0", *overrides, "name=t"])
    with build.trainer(run, Path("runs/t")) as trainer:
        trainer.fit()


def test_a_run_tells_how_it_goes(service: tuple[str, list[dict[str, str]]]) -> None:
    address, sent = service
    fit(f"notify=[{address}]")
    assert {message["title"] for message in sent} == {"trainkit: t"}
    told = " ".join(message["message"] for message in sent)
    assert "step 3: val_loss" in told
    assert "the best so far" in told
    assert "done at step 6 of 6" in told
    assert address not in Path("runs/t/run.yaml").read_text()  # it may hold a secret
    assert runs.read(Path("runs/t")).notify == ()  # type: ignore[union-attr]


def test_an_address_that_fails_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    fit("notify=[json://127.0.0.1:9/nobody]", "tracking=console+jsonl")
    out = capsys.readouterr().out
    assert out.count("warning: a notification could not be sent") == 1
    assert "saved step 6" in out


def test_what_is_no_address_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"notify=nowhere:.* is no address that apprise knows"):
        Notifier(["nowhere://x"], "t", print)
