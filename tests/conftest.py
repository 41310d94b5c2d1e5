"""Fixtures for all tests: the pack under a name of its own, golden data, ComfyUI in this process and as a server."""

import asyncio
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "data" / "checkpoint"
GOLDEN = ROOT / "tests" / "data" / "golden"
NANO = ROOT / "demo" / "internvl-u-nano"
# The test model is so small that a second thread only waits, and waits long where the machine is busy.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the servers

PICTURE_CASES = ("t2i_square", "t2i_wide", "t2i_odd_size")
EDIT_CASES = ("edit_one", "edit_placeholder", "edit_large_ref")
THOUGHT_CASES = ("cot_t2i", "cot_edit", "cot_t2i_eos", "cot_t2i_img", "cot_short", "cot_edit_short")
TEXT_CASES = ("qa_one", "qa_two", "qa_text_only", "qa_beam")

# Our folder `nodes` would hide ComfyUI's module of that name if the root were on sys.path.
pack = types.ModuleType("pack")
pack.__path__ = [str(ROOT)]
sys.modules["pack"] = pack


class PackFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the pack's modules under the names that `training` and `benchmarks`, run from the root, know them by.

    A second copy would have classes of its own, and no span or config would be equal to the other copy's.
    """

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "internvl_u":
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        module = importlib.import_module(f"pack.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, PackFinder())
for name in ("training", "benchmarks"):
    spec = importlib.machinery.PathFinder.find_spec(name, [str(ROOT)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
Span = importlib.import_module("pack.internvl_u.rope").Span
comfyui_tools = importlib.import_module("pack.tools.comfyui")
version_of = importlib.import_module("pack.tools.fetch").version_of


def versions():
    """What the tests run on: processor, Python, packages, ComfyUI."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kernels = torch.backends.cpu.get_cpu_capability()
    comfyui = os.environ.get("INTERNVLU_COMFYUI")
    packages = ("torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "Pillow", "diffusers", "safetensors")
    return {
        "processor": f"{names[0] if names else platform.processor() or platform.machine()} ({kernels})",
        "system": platform.system(),
        "Python": platform.python_version(),
        **{package: version(package) for package in packages},
        "ComfyUI": version_of(Path(comfyui)) if comfyui else "none",
    }


def pytest_report_header():
    folder = os.environ.get("INTERNVLU_COMFYUI") or "none: the tests that need it are skipped"
    return [*(f"{key}: {value}" for key, value in versions().items()), f"ComfyUI's folder: {folder}"]


def pytest_terminal_summary(terminalreporter):
    """Tells once more what was tested, and writes it to the file that INTERNVLU_TESTED names; see noxfile.py."""
    tested = versions()
    terminalreporter.write_line("tested on " + ", ".join(f"{key} {value}" for key, value in tested.items()))
    file = os.environ.get("INTERNVLU_TESTED")
    if file:
        counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped")}
        counts["failed"] += counts.pop("error")
        Path(file).write_text(json.dumps(tested | counts | {"date": time.strftime("%Y-%m-%d")}), encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """One golden case: what was asked for and every tensor that the official code computed."""

    name: str
    prompt: str
    width: int
    height: int
    steps: int
    images: tuple
    new: int
    beams: int
    text: str
    tensors: dict

    def __getitem__(self, key):
        return self.tensors[key]

    def context(self, branch):
        return self["context"][branch][self["context_mask"][branch]]

    def layout(self, branch):
        """The spans of a branch's context: words, and pictures of 4 x 4 tokens."""
        is_image = self["context_image_mask"][branch][self["context_mask"][branch]]
        runs, counts = torch.unique_consecutive(is_image, return_counts=True)
        return tuple(Span(int(count), *((4, 4) if run else ())) for run, count in zip(runs, counts))


@pytest.fixture(scope="session")
def manifest():
    return json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden(manifest):
    def read(name):
        stated = manifest["cases"][name]
        tensors = load_file(GOLDEN / f"{name}.safetensors")
        pictures = tuple(GOLDEN / f"image_{letter}.png" for letter in stated.get("images", ()))
        defaults = {"width": 0, "height": 0, "steps": 0, "new": 0, "beams": 1, "generated_text": ""}
        width, height, steps, new, beams, text = (stated.get(key, default) for key, default in defaults.items())
        return Case(name, stated["prompt"], width, height, steps, pictures, new, beams, text, tensors)

    return read


@pytest.fixture(params=PICTURE_CASES)
def case(request, golden):
    return golden(request.param)


@pytest.fixture(params=EDIT_CASES)
def edit(request, golden):
    return golden(request.param)


@pytest.fixture(params=THOUGHT_CASES)
def thinking(request, golden):
    return golden(request.param)


@pytest.fixture(params=[*PICTURE_CASES, *EDIT_CASES, *THOUGHT_CASES])
def drawn(request, golden):
    return golden(request.param)


@pytest.fixture(params=TEXT_CASES)
def question(request, golden):
    return golden(request.param)


@pytest.fixture(scope="session")
def checkpoint():
    return CHECKPOINT


@pytest.fixture
def broken(tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


@pytest.fixture(scope="session")
def near():
    def check(actual, expected, tolerance=1e-4):
        assert actual.shape == expected.shape
        error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
        assert error <= tolerance, f"relative error {error:.2e}, at most {tolerance:.0e} expected"

    return check


@pytest.fixture(scope="session")
def same_picture():
    """Two 8-bit pictures [H, W, 3] agree within 1 level at 99.9 % of their values."""

    def check(actual, expected):
        actual, expected = (numpy.asarray(picture).astype(int) for picture in (actual, expected))
        assert actual.shape == expected.shape
        assert (numpy.abs(actual - expected) <= 1).mean() >= 0.999

    return check


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """The registry's archive of this tree, unpacked: made by comfy-cli, else as .comfyignore says."""

    def listed(*options):
        line = ["git", "ls-files", "-z", "--cached", "--others", *options]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
        return {name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()}

    def copy(names, folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)

    unpacked, names = tmp_path_factory.mktemp("archive") / "internvl-u", listed("--exclude-standard")
    if importlib.util.find_spec("comfy_cli") is None:
        copy(names - listed("-i", "-X", ".comfyignore"), unpacked)
        return unpacked
    source = tmp_path_factory.mktemp("tree")
    copy(names, source)
    quiet = {"DO_NOT_TRACK": "1", "COMFY_NO_TELEMETRY": "1", "COMFY_NO_UPDATE_CHECK": "1"}
    line = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "node", "pack"]
    subprocess.run(line, cwd=source, check=True, capture_output=True, timeout=120, env=os.environ | quiet)
    shutil.unpack_archive(source / "node.zip", unpacked)
    return unpacked


@pytest.fixture(scope="session")
def comfyui():
    """ComfyUI's folder, its modules importable in this process, on the CPU."""
    path = os.environ.get("INTERNVLU_COMFYUI")
    if not path:
        pytest.skip("no ComfyUI: run the tests with `python dev.py test`, or set INTERNVLU_COMFYUI to its folder")
    sys.path.insert(0, path)
    import comfy.cli_args
    import utils.extra_config  # noqa: F401 - first, as in main.py: nodes.py puts ComfyUI's other module `utils` before it

    comfy.cli_args.args.cpu = True
    return Path(path)


@pytest.fixture(scope="session")
def native(comfyui):
    return importlib.import_module("pack.native.load")


@pytest.fixture(scope="session")
def small_vae():
    """Random weights of a VAE 8 channels wide, by diffusers' names, under which values keep their size.

    The past of the kernels over time is among them.
    """
    generator, made = torch.Generator().manual_seed(0), {}
    for name, shape in importlib.import_module("pack.internvl_u.vae").vae_shapes(8).items():
        spread = (shape[1] * shape[-1] * shape[-2]) ** -0.5 if name.endswith("weight") else 0.1
        made[name] = torch.randn(shape, generator=generator) * spread + name.endswith("gamma")
    return made


@pytest.fixture
def count_reads(monkeypatch):
    """A function that returns a list for a multimodal model, which grows as it reads.

    It gets the tokens of each piece that goes through the language model, and "image" for each image through the tower.
    """

    def start(model):
        seen = []
        language, tower = model.language_model.model.forward, model.vision_model.forward

        def forward(embedded, *args, **kwargs):
            seen.append(embedded.shape[1])
            return language(embedded, *args, **kwargs)

        monkeypatch.setattr(model.language_model.model, "forward", forward)
        monkeypatch.setattr(model.vision_model, "forward", lambda pixels: seen.append("image") or tower(pixels))
        return seen

    return start


class Server(comfyui_tools.Server):
    """A running ComfyUI with only this pack, and what tests ask of it."""

    def __init__(self, comfyui, base, *flags, env=None):
        super().__init__(sys.executable, comfyui, base, "--cpu", *flags, own_group=False, env=env)

    def with_latent(self, graph):
        """Adds core's SaveLatent, named "latent", at the point where the picture is decoded."""
        decoders = {"InternVLU_DecodeLatent", "VAEDecode"}
        (samples,) = [node["inputs"]["samples"] for node in graph.values() if node["class_type"] in decoders]
        graph["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": samples, "filename_prefix": "latent"}}
        return graph

    def latent(self, entry):
        """Returns the latent that `with_latent` saved."""
        (file,) = self.files(entry, "latent", "latents")
        return load_file(file)["latent_tensor"]

    def picture(self, entry, node):
        """Returns the one picture [H, W, 3] that a SaveImage node wrote."""
        (file,) = self.files(entry, node)
        with Image.open(file) as image:
            return numpy.asarray(image.convert("RGB"))

    def listen(self, graph, act=None, timeout=120):
        """Runs a graph; returns the events (kind, data) and preview images that the websocket told.

        `act(kind, data)` hears each event as it comes.
        """
        return asyncio.run(asyncio.wait_for(self._listen(graph, act), timeout))

    async def _listen(self, graph, act):
        import aiohttp

        events, previews = [], []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId=listener") as socket:
            await asyncio.to_thread(self.queue, graph, "listener")
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    if struct.unpack(">I", message.data[:4])[0] == 1:
                        previews.append(message.data[8:])
                    continue
                event = json.loads(message.data)
                events.append((event["type"], event["data"]))
                if act is not None:
                    await asyncio.to_thread(act, *events[-1])
                if event["type"] in {"execution_success", "execution_error", "execution_interrupted"}:
                    return events, previews


def make_base(base):
    """Fills a ComfyUI base directory: this pack, the tiny checkpoint under two names, and the nano model."""
    comfyui_tools.make_base(base, {"tiny": CHECKPOINT, "InternVL-U": CHECKPOINT, NANO.name: NANO})
    return base.resolve()


def make_extra_paths(base):
    """Fills folders outside the base directory and returns the YAML file that tells ComfyUI of them."""
    for folder, name in (("own", "elsewhere"), ("shared", "in-diffusers"), ("shared", "tiny")):
        (base / "extra" / folder).mkdir(parents=True, exist_ok=True)
        (base / "extra" / folder / name).symlink_to(CHECKPOINT)
    (base / "extra" / "shared" / "another-model").mkdir()
    file = base / "extra_model_paths.yaml"
    file.write_text(f"tests:\n  base_path: {base}/extra\n  InternVL-U: own\n  diffusers: shared\n")
    return file


@pytest.fixture(scope="session")
def new_server(comfyui, tmp_path_factory):
    """Starts servers on base directories of their own, which `prepare(base)` may fill; they end with the tests."""
    with contextlib.ExitStack() as running:

        def start(name, prepare=lambda base: None, *flags, env=None):
            base = make_base(tmp_path_factory.mktemp(name))
            prepare(base)
            return running.enter_context(Server(comfyui, base, *flags, env=env))

        yield start


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("comfyui"))
    extra = make_extra_paths(base)
    with Server(comfyui, base, "--preview-method", "latent2rgb", "--extra-model-paths-config", extra) as running:
        yield running
