"""A ComfyUI as a process: started, asked, given graphs to run, and stopped. Standard library only."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from .processes import HOST, ROOT, WINDOWS, Child, DevError, tail

FOLDERS = ("custom_nodes", "models/InternVL-U", "models/loras", "input", "output", "user", "temp")


class Server:
    """A ComfyUI on the loopback interface, with a base directory of its own that holds its log.

    It listens on `port` if that is free, else on a port that is. Within the `with` block it answers.
    """

    def __init__(
        self,
        python: str | Path,
        comfyui: Path,
        base: Path,
        *flags: object,
        port: int = 0,
        log: Path | None = None,
        own_group: bool = True,
        env: dict[str, str] | None = None,
    ):
        self.base = base.resolve()
        self.log = log or self.base / "server.log"
        command = [python, comfyui.resolve() / "main.py", "--listen", HOST, "--base-directory", self.base]
        command += ["--disable-auto-launch", "--database-url", "sqlite:///:memory:", *flags]
        env = {"HF_HUB_OFFLINE": "1"} | (env or {})
        self.child = Child(command, log=self.log, cwd=self.base, own_group=own_group, env=env)
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.use_port(free_port(port))

    def use_port(self, port: int) -> None:
        """Say where it is to listen; before it is started."""
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.child.command = [part for part in self.child.command if not part.startswith("--port=")]
        self.child.command.append(f"--port={port}")

    def __enter__(self) -> Server:
        try:
            self.start()
        except DevError:
            if free_port(self.port) == self.port:
                raise
            self.use_port(free_port())  # somebody took the port between our look at it and the start
            self.start()
        return self

    def start(self) -> None:
        """Start it and return when it answers. Raises DevError, and leaves nothing running, if it does not."""
        self.child.__enter__()
        try:
            self.wait_until_ready()
        except BaseException:
            self.child.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        self.child.__exit__(*exc)

    def wait_until_ready(self, timeout: float = 180.0) -> None:
        """Return when ComfyUI answers. Raises DevError if it stops or is not ready in `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(OSError):
                if self.is_ours(self.get("/system_stats")):
                    return
            time.sleep(0.2)
        raise DevError(f"ComfyUI was not ready after {timeout:.0f} s:\n{tail(self.log)}")

    def is_ours(self, stats: dict) -> bool:
        """Return whether this ComfyUI gave these statistics, and not one that took the port at the same moment."""
        return str(self.base) in stats["system"].get("argv", [str(self.base)])

    def check(self) -> None:
        """Raise DevError with the end of the log if ComfyUI is no longer running."""
        status = self.child.process.poll()
        if status is not None:
            raise DevError(f"ComfyUI stopped by itself with exit status {status}:\n{tail(self.log)}")

    def get(self, path: str) -> dict:
        """Return the answer to GET `path`."""
        with self.opener.open(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict) -> dict:
        """Return the answer to POST `path`, also where that is a refusal."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self.opener.open(request, timeout=30) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def queue(self, graph: dict, client_id: str = "tools") -> dict:
        """Return ComfyUI's answer to a graph in the API's format: a prompt_id, or what is wrong with it."""
        return self.post("/prompt", {"prompt": graph, "client_id": client_id})

    def wait(self, prompt_id: str, timeout: float = 120.0) -> dict:
        """Return the history entry of a job when it has ended. Raises DevError if that takes too long."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise DevError(f"job {prompt_id} did not end in {timeout:.0f} s:\n{tail(self.log)}")

    def run(self, graph: dict, timeout: float = 120.0) -> dict:
        """Run a graph and return its history entry. Raises DevError if ComfyUI does not take it."""
        answer = self.queue(graph)
        if "prompt_id" not in answer:
            raise DevError(f"ComfyUI refused the graph: {json.dumps(answer, indent=1)}\nIts log: {self.log}")
        return self.wait(answer["prompt_id"], timeout)

    def outputs(self, entry: dict) -> dict:
        """Return what the output nodes of a job gave, by node. Raises DevError if the job failed."""
        if entry["status"]["status_str"] != "success":
            raise DevError(f"the graph failed: {self.error(entry)} ComfyUI's log: {self.log}")
        return entry["outputs"]

    def error(self, entry: dict) -> str:
        """Return the error that ended a job."""
        return next(
            data["exception_message"] for kind, data in entry["status"]["messages"] if kind == "execution_error"
        )

    def files(self, entry: dict, node: str, kind: str = "images") -> list[Path]:
        """Return the files that a node saved, or shows out of the temporary folder."""
        saved = entry["outputs"][node][kind]
        return [self.base / item["type"] / item["subfolder"] / item["filename"] for item in saved]

    def find(self, graph: dict, kind: str) -> str:
        """Return the id of the one node of a kind in an API graph."""
        (found,) = [name for name, node in graph.items() if node["class_type"] == kind]
        return found


def free_port(wanted: int = 0) -> int:
    """Return `wanted` if it is free on the loopback interface, else a port that is."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        return probe.getsockname()[1]


def make_base(base: Path, models: dict[str, Path]) -> None:
    """Fill a base directory: ComfyUI's folders, this pack, and models by their names in models/InternVL-U."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    link(ROOT, base / "custom_nodes" / "internvl-u")
    for name, model in models.items():
        link(model, base / "models" / "InternVL-U" / name)


def link(target: Path, at: Path) -> None:
    """Make `at` show the folder `target`: a symlink, else a junction (Windows), else a copy."""
    if at.exists() and at.samefile(target):
        return
    at.parent.mkdir(parents=True, exist_ok=True)
    if at.is_symlink():
        at.unlink()
    elif at.exists():
        shutil.rmtree(at)
    with contextlib.suppress(OSError):
        return at.symlink_to(target, target_is_directory=True)
    if WINDOWS and not subprocess.run(["cmd", "/c", "mklink", "/J", at, target], capture_output=True).returncode:
        return
    shutil.copytree(target, at, ignore=shutil.ignore_patterns(".git", ".venv", ".nox", ".dev", "__pycache__"))
