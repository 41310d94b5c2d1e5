"""GGUF files that nobody should send: refused by a sentence before anything of their word is made, and never listed."""

import json
import os
import re
import resource
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.internvl_u import load
from pack.internvl_u.checkpoint import holds_language_model, holds_transformer, open_checkpoint, open_part
from pack.internvl_u.convert import convert
from pack.internvl_u.gguf_header import read_header

from .conftest import ODD_GGUF, gguf_file, gguf_tensor
from .test_model_folders import graph, loader


@pytest.fixture(scope="module")
def real(checkpoint, tmp_path_factory):
    pytest.importorskip("gguf", reason="the package that writes GGUF files is a development tool")
    return convert(checkpoint, tmp_path_factory.mktemp("real"), "Q8_0")[0]


def written(tmp_path, data):
    file = tmp_path / "file.gguf"
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("name", ODD_GGUF)
def test_an_odd_file_is_refused_by_a_sentence_and_costs_nothing(tmp_path, name):
    data, said = ODD_GGUF[name]
    file = written(tmp_path, data)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert holds_transformer(file) is False and holds_language_model(file) is False
    with pytest.raises(RuntimeError, match=re.escape(said)) as error:
        open_part(file, "generation_decoder")
    assert str(file) in str(error.value) and len(str(error.value)) < 1000
    assert time.process_time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "memory was taken"


def test_a_whole_file_of_ours_without_a_model_in_it_is_no_crash(tmp_path):
    file = written(tmp_path, gguf_file(tensors=[gguf_tensor(axes=(32, 1), offset=0)]))
    assert read_header(file).tensors["a.weight"].shape == (1, 32)
    with pytest.raises(RuntimeError, match="not an InternVL-U checkpoint"):
        load.load_mmdit(file)


@pytest.mark.parametrize("form, name", [(10, "Q2_K"), (22, "IQ2_S"), (31, "dtype 31"), (2**32 - 1, "dtype 4294967295")])
def test_a_dtype_that_is_not_read_is_called_by_its_name(tmp_path, form, name):
    file = written(tmp_path, gguf_file(tensors=[gguf_tensor(axes=(256, 1), form=form)]))
    with pytest.raises(RuntimeError, match=rf"1 of 1 tensors are of a dtype that is not read \(a.weight: {name}\)"):
        open_part(file, "generation_decoder")


def test_a_file_that_was_cut_anywhere_is_refused(real, tmp_path):
    whole = real.read_bytes()
    start = min(one.start for one in read_header(real).tensors.values())
    for length in (
        *range(1, 200),
        *range(200, start, 97),
        *range(start, len(whole), len(whole) // 50),
        len(whole) - 65,
    ):
        file = written(tmp_path, whole[:length])
        assert not holds_transformer(file), length
        with pytest.raises(RuntimeError):
            load.load_mmdit(file)


@given(place=st.integers(0, 12000), byte=st.integers(0, 255))
def test_a_changed_byte_of_the_header_loads_or_is_refused(real, place, byte):
    content = bytearray(real.read_bytes())
    content[place] = byte
    file = real.with_name("changed.gguf")
    file.write_bytes(content)
    try:
        holds_transformer(file)
        load.load_mmdit(file)
    except (RuntimeError, FileNotFoundError) as error:
        assert 10 < len(str(error)) < 1500
    finally:
        file.unlink()


@given(data=st.binary(max_size=200), tensors=st.integers(0, 5), entries=st.integers(0, 5))
def test_any_header_is_read_or_refused(tmp_path_factory, data, tensors, entries):
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    file.write_bytes(gguf_file([data], counts=(tensors, entries)))
    assert holds_transformer(file) in (True, False)
    try:
        open_checkpoint(file).config("vlm")
    except RuntimeError as error:
        assert len(str(error)) < 1500


def test_a_file_that_is_written_to_while_it_is_mapped_is_noticed(real, tmp_path, monkeypatch):
    from pack.internvl_u import gguf_file as module
    from pack.internvl_u.files import check_unchanged

    monkeypatch.setattr(module, "SMALL", 0)
    file = written(tmp_path, real.read_bytes())
    model = load.load_mmdit(file, dtype=torch.float32)
    check_unchanged(model.mapped)
    with file.open("ab") as target:
        target.write(b"more")
    with pytest.raises(RuntimeError, match="has been written to since it was loaded"):
        check_unchanged(model.mapped)


def test_none_is_offered_and_picking_one_tells_what_it_is(littered):
    offered = loader(littered)
    assert ".gguf" not in json.dumps(offered)
    for name in ("another model", "flux", "another converter", "lfs pointer", "data cut off", "10**12 tensors"):
        answer = json.dumps(littered.queue(graph(model_name=f"{name}.gguf")), ensure_ascii=False)
        assert json.dumps(ODD_GGUF[name][1])[1:-1] in answer, answer
        answer = littered.error(littered.run(graph(model_name="tiny", mllm_name=f"{name}.gguf")))
        assert ODD_GGUF[name][1] in answer, answer
    assert littered.run(graph())["status"]["status_str"] == "success"


def test_foreign_files_are_left_at_their_first_words(tmp_path):
    """A model of others has some hundred thousand words of a tokenizer in its header."""
    words = b"".join(os.urandom(4).hex().encode().rjust(8) for _ in range(1000)) * 5000
    from .conftest import gguf_entry

    file = written(tmp_path, gguf_file([gguf_entry("general.architecture", "llama")], counts=(500, 30)) + words)
    begun = time.process_time()
    for _ in range(1000):
        assert not holds_transformer(file) and not holds_language_model(file)
    assert time.process_time() - begun < 20
