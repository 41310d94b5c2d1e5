"""What SECURITY.md says never happens: network, code and pickles of a model folder, other folders, questions."""

import ast
import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from .test_model_folders import graph

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = {"vlm": "pytorch_model", "generation_decoder": "pytorch_model", "vae": "diffusion_pytorch_model"}
SHIPPED = [file for folder in ("internvl_u", "native", "nodes") for file in sorted((ROOT / folder).glob("*.py"))]


class Written:
    """Unpickled, it writes the marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo unpickled >> '{self.marker}'",)


def infect(model, marker, tokenizer="whole"):
    """Puts into a model folder all that other libraries run; whatever is run writes the marker."""
    code = f"open({str(marker)!r}, 'a').write(__file__ + '\\n')\nclass Evil: pass\n"
    names = ("modeling_evil", "tokenization_evil", "configuration_evil", "processing_evil", "setup", "__init__")
    for folder in (model, *(model / part for part in ("vlm", "processor", "vae", "generation_decoder", "scheduler"))):
        for name in (*names, "pipeline", "sitecustomize", "conftest"):
            (folder / f"{name}.py").write_text(code)
        (folder / "evil.pth").write_text(f"import os; os.system({f'echo pth >> {marker}'!r})\n")
        for name in ("pytorch_model.bin", "model.ckpt", "model.pt", "model.pkl", "diffusion_pytorch_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Written(marker)))
    kinds = {"AutoConfig": "configuration_evil", "AutoModel": "modeling_evil", "AutoModelForCausalLM": "modeling_evil"}
    auto_map = {name: f"{module}.Evil" for name, module in kinds.items()}
    auto_map |= {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    template = "{{ raise_exception('the chat template was rendered') }}"
    for file in (*model.rglob("config.json"), *model.rglob("*_config.json")):
        told = json.loads(file.read_text(encoding="utf-8")) | {"auto_map": auto_map}
        if file.name == "tokenizer_config.json":
            told["chat_template"] = template
            if tokenizer == "of its own":
                told["tokenizer_class"] = "EvilTokenizer"
        file.write_text(json.dumps(told), encoding="utf-8")
    (model / "processor" / "chat_template.jinja").write_text(template)
    (model / "processor" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    if tokenizer != "whole":
        (model / "processor" / "tokenizer.json").unlink()
    return model


WATCH = """
import json, os, sys
root, model, out, comfyui = sys.argv[1:5]
events = []
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind",
           "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(model):
        events.append(("open", os.path.relpath(str(arguments[0]), model)))
    elif event in WATCHED and watching:
        events.append((event, repr(arguments)[:300]))
        if event.startswith("socket."):
            raise OSError("no network here")

import torch, jinja2
import transformers  # what it does while it is imported is its own
watching = True
sys.addaudithook(watch)
render, compiled = jinja2.Template.render, jinja2.Environment.from_string
jinja2.Template.render = lambda *a, **k: (events.append(("render", "")), render(*a, **k))[1]
jinja2.Environment.from_string = lambda *a, **k: (events.append(("from_string", "")), compiled(*a, **k))[1]
from internvl_u.__main__ import main
size = ["--width", "16", "--height", "16", "--steps", "1", "--max-new-tokens", "3"]
status = [
    main(["draw", "--model", model, "--prompt", "x", "--think", *size, "--out", out + "/x.png"]),
    main(["ask", "--model", model, "--prompt", "x", "--max-new-tokens", "3"]),
    main(["convert", "--model", model, "--out", out]),
]
if comfyui != "none":
    import importlib, types
    from pathlib import Path
    watching = False  # what ComfyUI does while it is imported is its own
    sys.path.insert(0, comfyui)
    import comfy.cli_args, utils.extra_config
    comfy.cli_args.args.cpu = True
    pack = sys.modules["pack"] = types.ModuleType("pack")
    pack.__path__ = [root]
    import server
    watching = True
    native = importlib.import_module("pack.native.load")
    _, language, _ = native.load(Path(model), "fp32")
    language.encode("x")
    status.append(0)
done, told = len(events), {"status": status, "events": list(events)}
import pickle, socket, subprocess
for act in (lambda: pickle.loads(pickle.dumps(os.getcwd)), lambda: socket.create_connection(("127.0.0.1", 9)),
            lambda: subprocess.run(["true"]), lambda: jinja2.Template("").render(), lambda: open(model + "/x.bin")):
    try:
        act()
    except OSError:
        pass
print("RESULT" + json.dumps(told | {"would_see": events[done:]}))
"""


@pytest.fixture(scope="session", params=["whole", "in parts"])
def watched(request, checkpoint, tmp_path_factory):
    """What happened while an infected model drew, thought, answered and was converted, in a process of its own."""
    folder = tmp_path_factory.mktemp("security")
    model = infect(Path(shutil.copytree(checkpoint, folder / "model")), folder / "marker", request.param)
    (folder / "out").mkdir()
    comfyui = os.environ.get("INTERNVLU_COMFYUI", "none")
    online = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    line = [sys.executable, "-c", WATCH, str(ROOT), str(model), str(folder / "out"), comfyui]
    done = subprocess.run(line, cwd=ROOT, env=online, capture_output=True, text=True, timeout=300)
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    told = json.loads(done.stdout.partition("RESULT")[2])
    return types.SimpleNamespace(**told, text=done.stdout + done.stderr, marker=folder / "marker")


def test_the_watch_sees_what_it_watches_for(watched, tmp_path):
    """The others are about nothing where it does not."""
    kinds = {kind for kind, _ in watched.would_see}
    assert {"pickle.find_class", "socket.getaddrinfo", "subprocess.Popen", "from_string", "render", "open"} <= kinds
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Written(marker)))
    assert marker.read_text() == "unpickled\n"


def of_kind(watched, *kinds):
    return [event for event in watched.events if event[0].startswith(kinds)]


def test_the_library_and_the_nodes_never_use_the_network(watched):
    assert set(watched.status) == {0}, watched.text
    assert of_kind(watched, "socket") == []


def test_no_code_of_a_model_folder_is_run(watched):
    assert not watched.marker.exists(), watched.marker.read_text()
    assert [name for kind, name in of_kind(watched, "open") if name.endswith((".py", ".pth", ".pyc"))] == []


def test_pickles_beside_the_weights_are_never_opened(watched):
    assert of_kind(watched, "pickle") == []
    opened = {Path(name).suffix for kind, name in of_kind(watched, "open")}
    assert ".json" in opened and not opened & {".bin", ".ckpt", ".pt", ".pkl"}, opened


def test_chat_templates_are_never_rendered(watched):
    assert of_kind(watched, "render", "from_string") == []
    assert "the chat template was rendered" not in watched.text


def test_no_other_program_is_started(watched):
    assert of_kind(watched, "subprocess", "os.") == []


ANSWERED = "y\n" * 20


def in_terminal(line, seconds=120):
    """Runs a program in a terminal of its own, in which "y" is typed again and again; returns status and text."""
    fcntl, pty, termios = (pytest.importorskip(name, reason="POSIX") for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()

    def prepare():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    child = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=prepare, cwd=ROOT)
    os.close(theirs)
    os.write(ours, ANSWERED.encode())
    text, deadline = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):  # the terminal is gone when the program has ended
        while time.monotonic() < deadline and (read := os.read(ours, 4096)):
            text += read
    os.close(ours)
    return child.wait(10), text.decode(errors="replace").replace(ANSWERED.replace("\n", "\r\n"), "")


@pytest.mark.parametrize("tokenizer, expected", [("whole", 0), ("in parts", 0), ("of its own", 1)])
def test_a_model_folder_asks_nothing_on_a_terminal_and_runs_nothing_whatever_is_answered(broken, tokenizer, expected):
    marker = broken.parent / "marker"
    infect(broken, marker, tokenizer)
    line = [sys.executable, "-m", "internvl_u", "ask", "--model", str(broken), "--prompt", "x", "--max-new-tokens", "3"]
    status, text = in_terminal(line)
    assert not marker.exists(), marker.read_text()
    assert not re.search(r"\[y/n\]|do you (wish|trust)", text, re.IGNORECASE), text
    assert status == expected and "Traceback" not in text, text
    if expected:
        assert "is unreadable" in text.splitlines()[-1], text


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_pickle_instead_of_weights_is_not_taken_for_weights(broken, native, part):
    from pack.internvl_u.pipeline import Pipeline

    marker = broken.parent / "marker"
    for file in (broken / part).glob("*.safetensors*"):
        file.unlink()
    for name in (f"{WEIGHTS[part]}.bin", "model.ckpt", "model.pt"):
        (broken / part / name).write_bytes(pickle.dumps(Written(marker)))
    pipeline = Pipeline(broken)
    loads = {"vlm": pipeline._mllm, "vae": pipeline._vae, "generation_decoder": lambda: native.load(broken, "fp32")}
    for load in (loads[part], lambda: native.load(broken, "fp32")):
        with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
            load()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["evil.safetensors", "evil.ckpt", "evil.pt", "evil.bin"])
def test_a_pickle_in_comfyuis_folders_is_never_unpickled(littered, name):
    """Also under a name that ends in .safetensors."""
    marker = littered.base / "marker"
    file = littered.base / "models" / "vae" / f"x{name}"
    file.write_bytes(pickle.dumps(Written(marker)))
    try:
        entry = littered.run(graph(model_name="tiny", vae_name=file.name))
        assert entry["status"]["status_str"] == "error"
        assert name.endswith(".safetensors") or "no VAE" in littered.error(entry)
    finally:
        file.unlink()
    assert not marker.exists()


HOOK = """
import sys
FILE = {file!r}

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "pickle.find_class", "subprocess.Popen"):
        with open(FILE, "a") as file:
            file.write(event + " " + repr(arguments[1:]) + "\\n")

sys.addaudithook(watch)
NODE_CLASS_MAPPINGS = {{}}
"""


@pytest.fixture(scope="session")
def infected(new_server, checkpoint):
    """A server with an infected model, which writes down what the whole ComfyUI does in the network."""

    def prepare(base):
        infect(
            Path(shutil.copytree(checkpoint, base / "models" / "InternVL-U" / "infected")), base / "marker", "in parts"
        )
        (base / "custom_nodes" / "a_watch.py").write_text(HOOK.format(file=str(base / "events.txt")))

    return new_server("security", prepare)


@pytest.mark.parametrize("name", ["text_to_image", "think_then_draw", "ask_about_a_picture"])
def test_a_server_with_an_infected_model_uses_no_network_and_runs_no_code_of_it(infected, name):
    shutil.copy(ROOT / "tests" / "data" / "golden" / "image_a.png", infected.base / "input" / "internvl_u_harbour.jpg")
    events = infected.base / "events.txt"
    events.write_text("")
    nodes = json.loads((ROOT / "tests" / "workflows" / f"{name}.api.json").read_text(encoding="utf-8"))
    small = {"model_name": "infected", "precision": "fp32", "preset": "custom", "width": 32, "height": 32, "steps": 1}
    for node in nodes.values():
        changed = small | {"max_new_tokens": 4}
        node["inputs"] |= {key: value for key, value in changed.items() if key in node["inputs"]}
    entry = infected.run(nodes)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert events.read_text() == "" and not (infected.base / "marker").exists()


OUTSIDE = (
    "../outside", "../../outside", "../../models/outside", "./../outside", "..\\outside", "..\\..\\outside",
    "..%2foutside", "%2e%2e/outside", "..%5Coutside", "C:\\outside", "C:/outside", "\\\\host\\outside",
    "file:///outside", "~/outside", "\0", "tiny\0", "tiny/../../outside", "", ".", "..", "/", "ABSOLUTE",
)  # fmt: skip


@pytest.fixture(scope="session")
def bait(littered, checkpoint, tmp_path_factory):
    """Good models outside of the registered folders: a name that was taken for a path would draw with them."""
    from pack.internvl_u.convert import convert

    files = convert(checkpoint, tmp_path_factory.mktemp("bait"))
    places = (littered.base, littered.base / "models", littered.base.parent)
    for place in places:
        if not (place / "outside").exists():
            shutil.copytree(checkpoint, place / "outside")
        for file, kind in zip(sorted(files), ("model", "mllm", "vae")):
            shutil.copyfile(file, place / f"outside_{kind}.safetensors")
    return littered.base / "outside"


def outside_names(bait, kind):
    for name in OUTSIDE:
        name = name.replace("ABSOLUTE", str(bait))
        yield name
        if "outside" in name:
            yield name.replace("outside", f"outside_{kind}.safetensors")


@pytest.mark.parametrize("linked", [False, True], ids=["typed", "over a link"])
@pytest.mark.parametrize("kind", ["model", "mllm", "vae"])
def test_a_name_is_never_a_path_out_of_the_registered_folders(littered, bait, kind, linked):
    assert littered.run(graph(model_name="tiny"))["status"]["status_str"] == "success"
    sentence = {"model": "no InternVL-U model", "mllm": "no language model", "vae": "no VAE"}[kind]
    tried = 0
    for name in outside_names(bait, kind):
        nodes = graph(**{"model_name": "tiny", f"{kind}_name": name})
        load = nodes[littered.find(nodes, "InternVLU_LoadModel")]["inputs"]
        load |= {"model_name": "tiny"} | {f"{kind}_name": name}
        if linked:
            nodes["name"] = {"class_type": "TestsSource", "inputs": {"value": name}}
            load[f"{kind}_name"] = ["name", 0]
        answer = littered.queue(nodes)
        entry = littered.wait(answer["prompt_id"]) if "prompt_id" in answer else None
        told = littered.error(entry) if entry else json.dumps(answer)
        assert sentence in told, (name, told)
        tried += 1
    assert tried > 35


def test_a_symbolic_link_in_a_registered_folder_is_followed(littered, checkpoint):
    """It is its owner's own: only who can write into the folders can make one."""
    place = littered.base / "models" / "InternVL-U" / "tiny"
    assert place.is_symlink() and place.resolve() == checkpoint.resolve()
    assert littered.run(graph(model_name="tiny"))["status"]["status_str"] == "success"


MODULES = {
    *("subprocess", "pickle", "cPickle", "dill", "marshal", "shelve", "socket", "ssl", "urllib", "http", "requests"),
    *("httpx", "aiohttp", "ftplib", "smtplib", "webbrowser", "ctypes", "runpy", "code", "pty", "getpass", "jinja2"),
    *("huggingface_hub", "modelscope"),
}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
ATTRIBUTES = {
    *("os.system", "os.popen", "os.startfile", "torch.load", "torch.hub", "torch.utils.cpp_extension"),
    *("importlib.import_module", "numpy.load", "sys.path"),
}
STARTERS = ("os.exec", "os.spawn", "os.posix_spawn", "os.fork")
KEYWORDS = {"trust_remote_code": True, "shell": True, "weights_only": False, "allow_pickle": True}
ALLOWED = {
    "native/compat.py": {"importlib.import_module"},  # modules of ComfyUI, by names that stand there
    "native/host.py": {"importlib.import_module"},  # those of its table, to see that they are there
    # The download, and what it fetches a file with. Inside their functions: see below.
    "internvl_u/download.py": {
        *("huggingface_hub", "huggingface_hub.HfApi", "huggingface_hub.ModelInfo", "huggingface_hub.constants"),
        *("huggingface_hub.hf_hub_url", "huggingface_hub.utils", "huggingface_hub.utils.build_hf_headers"),
    },
    "internvl_u/transfer.py": {
        *("huggingface_hub", "huggingface_hub.constants", "huggingface_hub.errors", "huggingface_hub.utils"),
        *("huggingface_hub.errors.OfflineModeIsEnabled", "huggingface_hub.utils.get_session"),
    },
}
"""What is allowed where, by file. An entry here is a change for SECURITY.md."""


def dangers(tree):
    """Yields what of a module's text could run code, start a program, use the network or ask a question."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {node.module or "", *(f"{node.module}.{name.name}" for name in node.names)}
            yield from (name for name in names if name.split(".")[0] in MODULES or name in ATTRIBUTES)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield node.func.id
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS:
                    value = keyword.value
                    if not isinstance(value, ast.Constant) or value.value is KEYWORDS[keyword.arg]:
                        yield f"{keyword.arg}={ast.unparse(value)}"
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in ATTRIBUTES or name.startswith(STARTERS):
                yield name


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_ships_calls_nothing_that_runs_code_or_uses_the_network(file):
    found = set(dangers(ast.parse(file.read_text(encoding="utf-8"))))
    assert found == ALLOWED.get(f"{file.parent.name}/{file.name}", set())


DOWNLOADERS = {"download", "transfer"}


def test_the_download_is_called_in_two_places_alone():
    """The command line's `download`, and Load InternVL-U after it was asked for; nothing else imports its modules."""
    importers = {}
    for file in SHIPPED:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = (node.module or "").split(".")[-1]
                for name in DOWNLOADERS & {module, *(name.name for name in node.names)}:
                    importers.setdefault(name, set()).add(f"{file.parent.name}/{file.name}")
    assert importers == {
        "download": {"internvl_u/__main__.py", "nodes/load.py"},
        "transfer": {"internvl_u/download.py"},
    }
    calls = [
        ast.unparse(node)
        for name in ("internvl_u/__main__.py", "nodes/load.py")
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "download"
    ]
    assert calls == [
        "download(target, options.source, options.revision, show)",
        "download(found.transformer, source, progress=DownloadProgress())",
    ]


def test_huggingface_hub_is_imported_by_a_download_alone():
    for file in SHIPPED:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "huggingface_hub" not in ast.unparse(node), f"{file}:{node.lineno}"


@pytest.mark.parametrize(
    "text",
    [
        *("eval('1')", "exec(text)", "import pickle", "from urllib import request", "import urllib.request as u"),
        *("torch.load(f)", "from torch import load", "os.system('x')", "os.execv('x', [])", "run(x, shell=True)"),
        *("f(trust_remote_code=True)", "f(trust_remote_code=trust)", "def f():\n    import subprocess", "input('?')"),
    ],
)
def test_the_search_above_finds(text):
    assert list(dangers(ast.parse(text)))


def test_the_search_above_leaves_alone():
    text = "model.eval()\nre.compile('x')\ntorch.compile(f)\nf(trust_remote_code=False)\nfrom .load import load\n"
    assert not list(dangers(ast.parse(text)))


WRITERS = {
    *("write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rmtree", "rmdir", "touch", "rename", "symlink_to"),
    *("hardlink_to", "save", "save_file", "tofile", "copyfile", "copytree", "NamedTemporaryFile", "mkdtemp", "open"),
}


def test_the_nodes_write_no_files_but_the_pictures_of_a_chat():
    for file in SHIPPED:
        if file.parent.name != "internvl_u" and file != ROOT / "native" / "chat.py":  # see tests/comfy/test_chat.py
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                name = getattr(node, "attr", None) or getattr(node, "id", None)
                assert name not in WRITERS, f"{file}:{node.lineno}"


def test_each_test_that_security_md_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    files = [*(ROOT / "tests").rglob("*.py")]
    there = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}
    assert named and named <= there, sorted(named - there)
    own = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.M))
    about_tests = {"test_the_watch_sees_what_it_watches_for", "test_each_test_that_security_md_names_is_there"}
    assert {name for name in own - named - about_tests if "search_above" not in name} == set()
