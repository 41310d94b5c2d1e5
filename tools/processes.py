"""Processes that end with the one that started them, their logs, and errors for the person at the keyboard."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = os.name == "nt"
HOST = "127.0.0.1"


class DevError(Exception):
    """Something that the person at the keyboard can put right; the text says how."""


def say(text: str) -> None:
    """Print one line at once, also when the output is a pipe."""
    print(text, flush=True)


def tail(log: Path, lines: int = 30) -> str:
    """Return the last `lines` lines of `log`, indented."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (the log is empty)"


def child_environment() -> dict[str, str]:
    """Return the environment for every child: no telemetry, no update checks, no proxy for loopback."""
    bypass = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST, "localhost"]))
    quiet = ("DO_NOT_TRACK", "COMFY_NO_TELEMETRY", "COMFY_NO_UPDATE_CHECK", "COMFY_CLI_NO_REMOTE_REFRESH")
    env = os.environ | dict.fromkeys((*quiet, "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_INPUT"), "1")
    return env | {"NO_PROXY": bypass, "no_proxy": bypass, "GIT_PYTHON_REFRESH": "quiet"}


def lock(file: IO) -> bool:
    """Take an open file for this process alone, until it is closed; returns False where another process has it.

    Where a file system knows no locks, everybody gets it.
    """
    try:
        if WINDOWS:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


class Child:
    """A process with a log; leaving the `with` block ends it, and with `own_group` all that it started.

    Without `own_group` it stays in the process group of its starter and is ended together with that.
    """

    def __init__(
        self,
        command: list[object],
        *,
        log: Path | None = None,
        grace: float = 5.0,
        cwd: Path = ROOT,
        own_group: bool = True,
        env: dict[str, str] | None = None,
    ):
        self.command = [str(part) for part in command]
        self.log = log
        self.grace = grace
        self.cwd = cwd
        self.own_group = own_group
        self.env = child_environment() | (env or {})

    def __enter__(self) -> Child:
        options = {}
        if self.own_group:
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if WINDOWS else {"start_new_session": True}
        with self.log.open("wb") if self.log else contextlib.nullcontext() as out:
            if out:
                options |= {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.command, cwd=self.cwd, env=self.env, **options)
        return self

    def __exit__(self, *exc: object) -> None:
        if WINDOWS:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(self.process.pid)], capture_output=True, check=False)
            self.process.wait()
            return
        try:
            if self.process.poll() is None:
                self._send(signal.SIGINT)
                self.process.wait(self.grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._send(signal.SIGKILL)
            self.process.wait()

    def _send(self, number: int) -> None:
        """Send a signal to the process, or to its group, if there is any of it left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.own_group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def wait(self) -> int:
        """Return the exit status. Polls, because Windows cannot interrupt a blocking wait with Ctrl-C."""
        while (status := self.process.poll()) is None:
            time.sleep(0.05)
        return status


def run_logged(command: list[object], log: Path, what: str, advice: str, env: dict[str, str] | None = None) -> None:
    """Run `command` with its output in `log`. Raises DevError with the end of that log."""
    with Child(command, log=log, env=env) as child:
        status = child.wait()
    if status:
        raise DevError(f"{what} failed with exit status {status}:\n{tail(log, 15)}\n{advice}")
