"""A real kernel, as a front end sees it: interrupts at every phase, queued cells, completion, help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

TIMEOUT_S = 120
CAPITAL = "%%llm --no-history -t 0\nWhat is the capital of France?"
STORY = "%%llm told << --no-history -t 0 -n 400\nTell me a long story. {'It rains in the forest. ' * 100}"


class Kernel:
    """One kernel and a client that waits for its messages."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager, self.client = manager, client

    def send(self, code: str) -> str:
        """Queue a cell; returns the id of its request."""
        return self.client.execute(code)

    def reply(self, request: str) -> dict[str, Any]:
        """The reply to a request."""
        while True:
            message = self.client.get_shell_msg(timeout=TIMEOUT_S)
            if message["parent_header"].get("msg_id") == request:
                return message["content"]

    def shown(self, request: str) -> Iterator[dict[str, Any]]:
        """Bundles and streams that a cell shows, as they come, until it is over."""
        while True:
            message = self.client.get_iopub_msg(timeout=TIMEOUT_S)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return
            if kind in ("display_data", "update_display_data"):
                yield content["data"]
            elif kind == "error":
                yield {"error": content}
            elif kind == "stream":
                yield {"text/plain": content["text"]}

    def run(self, code: str) -> list[dict[str, Any]]:
        """Run a cell that raises nothing; what it showed."""
        request = self.send(code)
        shown = list(self.shown(request))
        reply = self.reply(request)
        assert reply["status"] == "ok", reply
        return shown

    def value(self, expression: str) -> str:
        """The ``repr`` of an expression."""
        request = self.client.execute("", user_expressions={"x": expression}, silent=True)
        found = self.reply(request)["user_expressions"]["x"]
        assert found["status"] == "ok", found
        return found["data"]["text/plain"]

    def interrupt_when(self, code: str, moment: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Run a cell with another queued behind it, and interrupt it at a moment; what it showed.

        The cell must end by ``KeyboardInterrupt`` and the queued one must not have run.
        """
        self.run("ran_after = False")
        request = self.send(code)
        queued = self.send("ran_after = True")
        shown, is_interrupted = [], False
        for bundle in self.shown(request):
            shown.append(bundle)
            if not is_interrupted and moment(bundle):
                self.manager.interrupt_kernel()
                is_interrupted = True
        assert is_interrupted, shown
        reply = self.reply(request)
        assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
        assert len(reply["traceback"]) == 1, reply["traceback"]
        assert self.reply(queued)["status"] == "aborted"
        assert self.value("ran_after") == "False"
        return shown


@pytest.fixture(scope="module")
def kernel(starter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with the extension, in a folder of its own."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "a-model").mkdir()
    manager = KernelManager()
    manager.start_kernel(cwd=str(folder))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=TIMEOUT_S)
        kernel = Kernel(manager, client)
        kernel.run("%load_ext llm_magic\nfrom llm_magic import llm")
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def test_an_interrupted_load_leaves_no_model(kernel) -> None:
    kernel.interrupt_when("%llm load starter --as never", lambda shown: "importing" in _html(shown))
    assert kernel.value("llm.session.models") == "{}"


@pytest.fixture(scope="module")
def models(kernel) -> Kernel:
    """The same kernel with the starter loaded twice: in RAM, and with most blocks on disk."""
    kernel.run("%llm load starter --as ram -c 2048")
    kernel.run("%llm load starter --as disk --max-memory cpu=150MiB")
    assert "'disk'" in kernel.value("llm.plan.device_map.values()")
    return kernel


MOMENTS = {
    "at once": lambda shown: True,
    "in the prefill": lambda shown: "reading the prompt" in _html(shown),
    "at the first words": lambda shown: bool(shown["text/plain"]),
    "in mid-answer": lambda shown: len(shown["text/plain"].split()) > 12,
}


@pytest.mark.parametrize("model", ["ram", "disk"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_keeps_the_text_and_the_next_answer_is_right(models, model, moment) -> None:
    models.run(f"%llm use {model}")
    models.run("told = _llm = None")
    shown = models.interrupt_when(STORY, MOMENTS[moment])
    live = [bundle["text/plain"] for bundle in shown[:-2] if "text/plain" in bundle]
    told = models.value("str(told)")
    assert models.value("told is _llm and told.finish_reason") == "'interrupted'"
    assert live[-1] in eval(told)
    assert "interrupted" in shown[-2]["text/plain"]
    assert shown[-1]["error"]["ename"] == "KeyboardInterrupt"
    models.run(CAPITAL)
    assert models.value("str(_llm)") == "'The capital of France is Paris.'"


def test_what_a_failed_cell_shows(models) -> None:
    request = models.send("%%llm --param no_such_thing 1\nHello")
    *rest, error = models.shown(request)
    assert models.reply(request)["ename"] == "OptionError"
    assert len(error["error"]["traceback"]) <= 2
    assert rest[-1]["text/plain"] == ""


@pytest.mark.parametrize(
    ("typed", "offers"),
    [
        ("%llm lo", {"load", "log"}),
        ("%llm load st", {"starter"}),
        ("%llm load a-mo", {"a-model/"}),
        ("%llm load ./a-mo", {"./a-model/"}),
        ("%llm load starter --dev", {"--device-map"}),
        ("%llm load starter --device-map bal", {"balanced", "balanced_low_0"}),
        ("%llm load starter --max-memory c", {"cpu="}),
        ("%llm unload d", {"disk"}),
        ("%%llm --temp", {"--temperature"}),
        ("%%llm -m r", {"ram"}),
        ("%%llm -f js", {"json"}),
    ],
)
def test_completion_replaces_just_what_was_typed(models, typed, offers) -> None:
    found = models.reply(models.client.complete(typed))
    completed = {typed[: found["cursor_start"]] + match for match in found["matches"]}
    begun = typed[: len(typed) - len(typed.split()[-1])]
    assert {begun + offer for offer in offers} <= completed


@pytest.mark.parametrize(("what", "says"), [("%llm", "%llm load starter"), ("%%llm", "--continue")])
def test_help_comes_with_examples(models, what, says) -> None:
    shown = models.reply(models.send(f"{what}?"))["payload"]
    assert says in shown[0]["data"]["text/plain"]
    assert models.reply(models.client.inspect(what))["found"]


def _html(shown: dict[str, Any]) -> str:
    return shown.get("text/html", "")
