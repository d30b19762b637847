"""A real Jupyter server and a real browser, both private to the test session."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nbformat
import psutil
from playwright.sync_api import Browser, BrowserContext, Page, Route

App = Literal["lab", "notebook"]
REPOSITORY = Path(__file__).parents[2]
# Other versions of ipykernel: `make kernels` installs them.
KERNELS = Path(sys.prefix) / "kernels"
# What a browser may do on its own: nothing. Debian's chromium runs as root only without its sandbox.
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
START_S = 90.0
CELL_S = 240.0  # less than a test has, so that what hangs can be looked at
SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    # Every output is in the page, however many there are and wherever it is scrolled to.
    "notebook-extension/tracker": {"maxNumberOutputs": 10_000, "windowingMode": "none"},
}
# A real dialog stops the page, and with it whatever the test waits for. ``pwned`` is what hostile
# payloads set.
RECORD_SCRIPTS = """
globalThis.scriptsRan = [];
for (const name of ['alert', 'confirm', 'prompt', 'print'])
    globalThis[name] = message => { top.scriptsRan.push(`${name}(${message})`) };
Object.defineProperty(globalThis, 'pwned', { set: () => { top.scriptsRan.push('pwned') } });
"""
# Run by every kernel: a signal writes the stacks of all its threads.
TELL_STACKS = """
import faulthandler, os, signal
faulthandler.register(signal.SIGUSR1, open(os.path.join({folder!r}, f"{{os.getpid()}}.txt"), "w"))
"""


def chromium_path() -> str | None:
    """The system's Chromium, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Server:
    """JupyterLab and Notebook 7 on a free loopback port, with folders and a token of their own."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        self.notebooks = folder / "notebooks"
        self._log = folder / "server.log"
        self._stacks = folder / "stacks"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process = self._start(folder)
        self._wait()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, app: App, notebook: str) -> str:
        place = {"lab": "lab/tree", "notebook": "notebooks"}[app]
        # A new workspace: the default one opens the notebooks of earlier tests again.
        return f"{self.origin}/{place}/{notebook}?token={self.token}&reset"

    def stop(self) -> None:
        """End the server, which ends its kernels."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def where_it_is(self) -> str:
        """The end of the server's log, and where each thread of each kernel is."""
        kernels = psutil.Process(self._process.pid).children()
        files = [file for kernel in kernels if (file := self._stacks / f"{kernel.pid}.txt").exists()]
        for file in files:
            os.kill(int(file.stem), signal.SIGUSR1)
        time.sleep(2)  # for a report, whatever state the kernels are in
        stacks = (f"Kernel {file.stem}:\n{file.read_text()}" for file in files)
        return "\n\n".join([f"Server:\n{self._log.read_text()[-4000:]}", *stacks])

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        for name in ("home", "config", "data", "runtime", "ipython", "workspaces", "settings"):
            (folder / name).mkdir()
        self.notebooks.mkdir()
        self._stacks.mkdir()
        startup = folder / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "stacks.py").write_text(TELL_STACKS.format(folder=str(self._stacks)))
        for target in KERNELS.glob("*"):
            _write_kernelspec(folder / "data", target)
        for name, values in SETTINGS.items():
            file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0"]
        command += [f"--ServerApp.root_dir={self.notebooks}", f"--IdentityProvider.token={self.token}"]
        command += ["--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True"]
        environment = os.environ | {
            "HOME": str(folder / "home"),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "PYTHONPATH": str(REPOSITORY),  # so that cells can import the tests' payloads
        }
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.origin}/api/status?token={self.token}", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)  # polling a process that is starting, not waiting for a result
        self.stop()
        raise RuntimeError(f"Jupyter did not start:\n{self._log.read_text()[-4000:]}")


@dataclass
class Traffic:
    """What a page did that model output must never make it do."""

    foreign_requests: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    popups: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what the front end itself did when it started."""
        for record in (self.foreign_requests, self.images, self.popups):
            record.clear()


class Notebook:
    """One notebook, open in JupyterLab or Notebook 7, with its kernel connected."""

    def __init__(self, server: Server, browser: Browser, app: App, name: str, *, dark: bool = False) -> None:
        self.server = server
        self.name = name
        self.traffic = Traffic()
        self._context: BrowserContext = browser.new_context(viewport={"width": 1280, "height": 1600})
        self._context.route("**/*", self._guard)
        self._context.add_init_script(RECORD_SCRIPTS)
        self.page: Page = self._context.new_page()
        self._context.on("page", lambda page: self.traffic.popups.append(page.url))
        self.page.goto(server.url(app, name))
        self.wait_for_kernel()
        # Always: the server remembers the theme of the notebook before.
        self.set_theme("JupyterLab Dark" if dark else "JupyterLab Light")

    def close(self) -> None:
        self.page.evaluate("() => jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
        self._context.close()

    def run_all(self) -> None:
        """Run every cell and wait for the end of the last one; a cell that fails stops the rest."""
        self.page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")

    def start_cells(self, first: int, last: int) -> None:
        """Queue some cells and return at once."""
        self._select(first, last)
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-cell') }")

    def run_cell(self, cell: int) -> None:
        """Run one cell and wait for its end."""
        self._select(cell, cell)
        has_ended = self.page.evaluate(
            """limit => Promise.race([
                jupyterapp.commands.execute('notebook:run-cell').then(() => true),
                new Promise(resolve => setTimeout(() => resolve(false), limit)),
            ])""",
            CELL_S * 1000,
        )
        assert has_ended, f"Cell {cell} has not ended in {CELL_S:.0f} s.\n{self._where_it_is()}"

    def _where_it_is(self) -> str:
        """What can be known of a cell that does not end."""
        kernel = self.page.evaluate(
            """() => {
                const { kernel } = jupyterapp.shell.currentWidget.context.sessionContext.session;
                return [kernel.connectionStatus, kernel.status];
            }"""
        )
        cells = self.page.locator(".jp-Notebook").inner_text()
        return f"The page says {kernel} and shows:\n{cells}\n\n{self.server.where_it_is()}"

    def interrupt(self) -> None:
        """Press ■, and wait until no cell runs; the kernel's status also tells of messages of widgets."""
        self.page.evaluate("() => jupyterapp.commands.execute('notebook:interrupt-kernel')")
        self.page.wait_for_function(
            """() => [...document.querySelectorAll('.jp-InputPrompt')].every(
                prompt => !prompt.textContent.includes('*'))"""
        )

    def _select(self, first: int, last: int) -> None:
        self.page.evaluate(
            """([first, last]) => {
                const notebook = jupyterapp.shell.currentWidget.content;
                notebook.deselectAll();
                notebook.activeCellIndex = first;
                if (last > first) notebook.extendContiguousSelectionTo(last);
            }""",
            [first, last],
        )

    def save(self) -> nbformat.NotebookNode:
        """Save in the browser, and read what the server wrote."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget.context.save()")
        return nbformat.read(self.server.notebooks / self.name, as_version=4)

    def set_theme(self, name: str) -> None:
        self.page.evaluate(
            "name => jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name
        )
        is_light = "false" if "Dark" in name else "true"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{is_light}']", state="attached")

    def output(self, cell: int) -> Any:
        """Locator of the rendered outputs of a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-OutputArea")

    def scripts_ran(self) -> list[str]:
        """What hostile scripts of the page did: dialogs they opened, ``pwned`` that they set."""
        return list(self.page.evaluate("() => globalThis.scriptsRan"))

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)

    def wait_for_kernel(self) -> None:
        """Wait until the notebook is open and its kernel answers.

        ipykernel 7.0 to 7.3 overlooks one request in about a hundred, until somebody connects to it
        (github.com/ipython/ipykernel/pull/1529): so somebody does, now and then.
        """
        # "idle" comes before the websocket is up, and what is run then is lost.
        self.page.wait_for_function(
            """name => {
                const context = globalThis.jupyterapp?.shell.currentWidget?.context;
                const session = context?.isReady && context.path === name && context.sessionContext;
                return session?.isReady && session.session?.kernel?.connectionStatus === 'connected';
            }""",
            arg=self.name,
            timeout=START_S * 1000,
        )
        self.page.evaluate(
            """async () => {
                const session = jupyterapp.shell.currentWidget.context.sessionContext;
                await session.ready;
                const { kernel } = session.session;
                if (/^ipykernel-7[.][0-3][.]/.test(kernel.name)) {
                    let other = kernel.clone();
                    setInterval(() => { other.dispose(); other = kernel.clone() }, 5000);
                }
                await kernel.info;
            }"""
        )

    def _guard(self, route: Route) -> None:
        request = route.request
        if not request.url.startswith((self.server.origin, "data:", "blob:")):
            self.traffic.foreign_requests.append(request.url)
            route.abort()
            return
        if request.resource_type in {"image", "media"} and "/static/" not in request.url:
            self.traffic.images.append(request.url)
        route.continue_()


def _write_kernelspec(data: Path, target: Path) -> None:
    """A kernel of another version of ipykernel, by the name ``ipykernel-VERSION``."""
    folder = data / "kernels" / f"ipykernel-{target.name}"
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": folder.name,
        "language": "python",
        "env": {"PYTHONPATH": os.pathsep.join([str(target), str(REPOSITORY)])},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))


def write_notebook(path: Path, cells: Sequence[str], kernel: str = "python3") -> None:
    """A notebook of code cells without outputs."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(notebook, path)
