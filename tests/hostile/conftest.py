"""A server whose model folders are full of what does not belong there, and graphs for it."""

import json
import os
import socket
import struct

import pytest
import torch
from safetensors.torch import save_file


def header(value, data=bytes(16)):
    """Bytes of a file in the form of safetensors, whatever its header says."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


QUERY, KEY = (f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k"))
ODD_FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a page": b"<!DOCTYPE html><html>not found</html>",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a site's error": b'{"error":"Access to model InternVL-U is restricted"}',
    "gguf": b"GGUF\3\0\0\0" + bytes(64),
    "a pickle": b"\x80\2}q\0.",
    "a zip": b"PK\3\4" + bytes(64),
    "cut off": header({"txt_norm.weight": entry((1000,), (0, 4000))}, bytes(100)),
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "no json": header(b"{]"),
    "no utf-8": header(b'{"txt_norm.weight\xff": 1}'),
    "a list": header([]),
    "a number": header(5),
    "null": header(None),
    "metadata null": header({"__metadata__": None, "txt_norm.weight": entry()}),
    "metadata a list": header({"__metadata__": [1], "txt_norm.weight": entry()}),
    "metadata of numbers": header({"__metadata__": {"internvl_u": 5}, "txt_norm.weight": entry()}),
    "ours but no json": header({"__metadata__": {"internvl_u": "{"}}),
    "ours but a list": header({"__metadata__": {"internvl_u": "[]"}}),
    "ours with a part that is none": header({"__metadata__": {"internvl_u": '{"part": ["vlm"]}'}}),
    "a scalar to_q": header({"txt_norm.weight": entry(), QUERY: 5, KEY: entry()}),
    "to_q without a shape": header({"txt_norm.weight": entry(), QUERY: {"dtype": "F32"}, KEY: entry()}),
    "to_q of no axes": header({"txt_norm.weight": entry(), QUERY: entry(()), KEY: entry(())}),
    "shape of texts": header({"txt_norm.weight": entry(), QUERY: entry(["a", "b"]), KEY: entry((1, 1))}),
    "negative shape": header({"txt_norm.weight": entry(), QUERY: entry((-2, 1)), KEY: entry((-1, 1))}),
    "huge number": header(b'{"txt_norm.weight": {"shape": [' + b"9" * 5000 + b"]}}"),
    "deep": header(b'{"txt_norm.weight":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "offsets beyond": header({"txt_norm.weight": entry((1,), (0, 10**12)), QUERY: entry(), KEY: entry()}),
    "offsets backwards": header({"txt_norm.weight": entry((1,), (4, 0)), QUERY: entry(), KEY: entry()}),
    "nan": header(b'{"txt_norm.weight": NaN}'),
    "another model": header({"model.layers.0.weight": entry()}, bytes(4)),
}


def gguf_text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_entry(key, value):
    return gguf_text(key) + struct.pack("<I", 8) + gguf_text(value)


def gguf_tensor(name="a.weight", axes=(32,), form=8, offset=0):
    return gguf_text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, form, offset)


ARCHITECTURE = gguf_entry("general.architecture", "internvl_u")
OURS = (ARCHITECTURE, gguf_entry("internvl_u.description", '{"part": "generation_decoder"}'))


def gguf_file(entries=OURS, tensors=(), data=bytes(64), *, counts=None, version=3, magic=b"GGUF"):
    """Bytes of a file in the form of GGUF; `counts` (tensors, entries) may say something else."""
    stated = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, *stated) + b"".join((*entries, *tensors))
    return head + bytes(-len(head) % 32) + data


ODD_GGUF = {
    "empty": (b"", "is empty"),
    "three bytes": (b"GGU", "is not readable as GGUF"),
    "magic alone": (b"GGUF", "is shorter than its header says"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
    "a page": (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
    "zeros": (bytes(64), "begins with zeros"),
    "safetensors": (header({"txt_norm.weight": entry()}), "is not readable as GGUF"),
    "wrong magic": (gguf_file(magic=b"GGUX"), "is not readable as GGUF"),
    "version 1": (gguf_file(version=1), "version 1 found, 2 or 3 expected"),
    "big endian": (gguf_file(version=3 << 24), "version 50331648 found"),
    "10**12 tensors": (gguf_file(counts=(10**12, 2)), "is shorter than its header says"),
    "10**12 entries": (gguf_file(counts=(0, 10**12)), "is shorter than its header says"),
    "2**64-1 tensors": (gguf_file(counts=(2**64 - 1, 2**64 - 1)), "is shorter than its header says"),
    "a million tensors": (gguf_file(data=bytes(33 << 20), counts=(10**6, 2)), "100000 expected at most"),
    "a key of 10**12": (gguf_file([struct.pack("<Q", 10**12)]), "is shorter than its header says"),
    "a text of 10**12": (
        gguf_file([gguf_text("k") + struct.pack("<IQ", 8, 10**12)]),
        "is shorter than its header says",
    ),
    "an array of 10**12": (
        gguf_file([gguf_text("k") + struct.pack("<IIQ", 9, 4, 10**12)]),
        "is shorter than its header says",
    ),
    "texts of 2**63": (
        gguf_file([gguf_text("k") + struct.pack("<IIQ", 9, 8, 2**63)]),
        "is shorter than its header says",
    ),
    "arrays in arrays": (
        gguf_file([gguf_text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)]),
        "an array of values of kind 9",
    ),
    "kind 77": (gguf_file([gguf_text("k") + struct.pack("<I", 77)]), "a value of kind 77"),
    "key no utf-8": (gguf_file([gguf_entry(b"\xff\xfe", "x")]), "is not readable as GGUF"),
    "another model": (gguf_file([gguf_entry("general.architecture", "llama")]), "a GGUF file of 'llama'"),
    "flux": (gguf_file([gguf_entry("general.architecture", "flux")]), "a GGUF file of 'flux'"),
    "no architecture": (gguf_file([]), "a GGUF file of no model"),
    "another converter": (gguf_file([ARCHITECTURE]), "without internvl_u.description: another converter"),
    "description no json": (
        gguf_file([ARCHITECTURE, gguf_entry("internvl_u.description", "{")]),
        "not readable as JSON",
    ),
    "description a list": (gguf_file([ARCHITECTURE, gguf_entry("internvl_u.description", "[]")]), "holds a list"),
    "description deep": (
        gguf_file([ARCHITECTURE, gguf_entry("internvl_u.description", "[" * 100_000)]),
        "not readable as JSON",
    ),
    "description of a wrong part": (
        gguf_file([ARCHITECTURE, gguf_entry("internvl_u.description", '{"part": "unet"}')]),
        "part 'unet' found",
    ),
    "alignment 0": (
        gguf_file([*OURS, gguf_text("general.alignment") + struct.pack("<II", 4, 0)]),
        "an alignment of 0 bytes",
    ),
    "nine axes": (gguf_file(tensors=[gguf_tensor(axes=(1,) * 9)]), "9 axes"),
    "2**32-1 axes": (gguf_file(tensors=[gguf_text("a") + struct.pack("<I", 2**32 - 1)], data=bytes(99)), "axes"),
    "a shape beyond": (gguf_file(tensors=[gguf_tensor(axes=(2**63, 2**63, 2**63, 2**60))]), "is shorter than"),
    "an offset beyond": (gguf_file(tensors=[gguf_tensor(offset=1 << 40)]), "is shorter than its header says"),
    "an odd offset": (gguf_file(tensors=[gguf_tensor(offset=3)]), "at 3, a multiple of 32 expected"),
    "a broken block": (gguf_file(tensors=[gguf_tensor(axes=(33,))]), "rows of 33 values found, a multiple of 32"),
    "the same name twice": (gguf_file(tensors=[gguf_tensor(), gguf_tensor()]), "stands there twice"),
    "data cut off": (gguf_file(tensors=[gguf_tensor(axes=(32, 1000))]), "is shorter than its header says"),
}
"""GGUF files that are not ours or not whole, and what is said of each."""
SAID = {
    "empty": "is empty",
    "a page": "is a web page",
    "lfs pointer": "is a Git LFS pointer",
    "zeros": "begins with zeros",
    "a site's error": "is a site's error",
    "gguf": "is a GGUF file",
    "a pickle": "is a pickle of PyTorch, which is never opened",
    "a zip": "is a pickle of PyTorch, which is never opened",
    "cut off": "is shorter than its header says",
    "longer than the file": "is shorter than its header says",
    "offsets beyond": "is shorter than its header says",
}
"""What is said of odd files that are one of the usual mistakes; of all others, that they are not readable."""
ODD_NAMES = ("a\nb", "<b>bold", "quo\"te'", "emoji \N{GRINNING FACE}", "sp ace", "per%20cent", "-dash")
FOLDERS = ("diffusion_models", "text_encoders", "vae")


SOURCE = """
import json


class Source:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "give", ("COMBO",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("STRING", {})}}

    def give(self, value):
        return (value,)


class Anything(str):
    def __ne__(self, other):
        return False


class Value(Source):
    RETURN_TYPES = (Anything("*"),)

    def give(self, value):
        return (json.loads(value),)


NODE_CLASS_MAPPINGS = {"TestsSource": Source, "TestsValue": Value}
"""


def litter(base):
    """Puts what does not belong there into ComfyUI's model folders, and beside the weights of a model."""
    for key in FOLDERS:
        folder = base / "models" / key
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in ODD_FILES.items():
            (folder / f"{name}.safetensors").write_bytes(data)
        for name, (data, _) in ODD_GGUF.items():
            (folder / f"{name}.gguf").write_bytes(data)
        for name in ODD_NAMES:
            (folder / f"{name}.safetensors").write_bytes(b"")
        for name in ("._model.safetensors", "Thumbs.db", ".DS_Store", "model.safetensors.part"):
            (folder / name).write_bytes(b"\0\5\26\7")
        (folder / "dead.safetensors").symlink_to(folder / "nowhere")
        (folder / "itself.safetensors").symlink_to(folder / "itself.safetensors")
        (folder / "a folder.safetensors").mkdir()
        os.mkfifo(folder / "pipe.safetensors")
        bind = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(folder)  # a socket's path may not be long
        bind.bind("socket.safetensors")
        os.chdir(here)
        bind.close()
        os.close(os.open(os.fsencode(folder) + b"/no utf-8 \xff.safetensors", os.O_CREAT))
    lora = {"diffusion_model.transformer_blocks.0.attn.to_v": 64, "language_model.model.layers.0.self_attn.q_proj": 64}
    weights = {f"{layer}.lora_A.weight": torch.ones(1, width) for layer, width in lora.items()}
    weights |= {f"{layer}.lora_B.weight": torch.zeros(width, 1) for layer, width in lora.items()}
    save_file(weights, base / "models" / "loras" / "both halves.safetensors")
    (base / "custom_nodes" / "tests_source.py").write_text(SOURCE)  # a value that comes over a link
    own = base / "models" / "InternVL-U"
    (own / "dead").symlink_to(own / "nowhere")
    (own / "itself").symlink_to(own / "itself")
    (own / "a file").write_bytes(b"")
    os.mkdir(os.fsencode(own) + b"/no utf-8 \xff")
    os.mkfifo(own / "pipe")


@pytest.fixture(scope="session")
def littered(new_server):
    """A running server in whose model folders lies what does not belong there."""
    return new_server("hostile", litter)
