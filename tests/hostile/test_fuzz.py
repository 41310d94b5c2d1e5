"""Inputs that nobody thought of: made by hypothesis, with a fixed budget here and a long one in `nox -s fuzz`.

Whatever comes in, it works, or it is refused by one of the errors that the functions state.
"""

import importlib
import json
import math
import os
import shutil
import struct

import numpy
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pack.internvl_u import images, load, sampling
from pack.internvl_u.checkpoint import SingleFile, check_folder, holds_language_model, holds_transformer, open_part
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.header import read_header
from pack.internvl_u.images import ReferenceSizes
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.prompt import branch_prompts, generation_prompt
from pack.internvl_u.tokenizer import ROW_TOKENS, Tokenizer
from PIL import Image

quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fixed", max_examples=150, derandomize=True, database=None, **quiet)
settings.register_profile("long", max_examples=int(os.environ.get("INTERNVLU_FUZZ", "0")) or 1, **quiet)
settings.load_profile("long" if "INTERNVLU_FUZZ" in os.environ else "fixed")

REFUSED = (RuntimeError, ValueError, FileNotFoundError)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from(
        [0, -1, 1, 2**31, 2**63, 2**64, 10**12, 10**400, 1e-320, math.nan, math.inf, -math.inf, -0.0, 1e308]
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=6,
)
FILES = ("vlm/config.json", "generation_decoder/config.json", "vae/config.json", "model_index.json")
FILES += ("processor/processor_config.json", "vlm/model.safetensors.index.json")


def places(value, path=()):
    """Yields the path of each value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value, path, new):
    """Returns a JSON value with another one at a path; None as the new one's place takes it away."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = put(copied[path[0]], path[1:], new)
    return copied


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    return shutil.copytree(checkpoint, tmp_path_factory.mktemp("fuzz") / "model")


@given(data=st.data())
def test_a_changed_configuration_works_or_is_refused(model, checkpoint, data):
    file = data.draw(st.sampled_from(FILES))
    whole = json.loads((checkpoint / file).read_text(encoding="utf-8"))
    path = data.draw(st.sampled_from([*places(whole)]))
    (model / file).write_text(json.dumps(put(whole, path, data.draw(values))), encoding="utf-8")
    try:
        Pipeline(model).draw(ImageRequest("a cat", 16, 16, 1))
    except REFUSED as error:
        assert 10 < len(str(error)) < 1500
    finally:
        shutil.copy(checkpoint / file, model / file)


@given(text=st.one_of(st.binary(max_size=300), values.map(lambda value: json.dumps(value).encode())))
@pytest.mark.parametrize("file", FILES[:2])
def test_any_bytes_for_a_configuration_are_refused(model, checkpoint, file, text):
    (model / file).write_bytes(text)
    try:
        with pytest.raises(REFUSED) as error:
            check_folder(model)
            load.load_mllm(model) if file.startswith("vlm") else load.load_mmdit(model)
            assume(not text.lstrip().startswith(b"{"))  # an object may lack all that has a default
        assert 10 < len(str(error.value)) < 1500
    except pytest.fail.Exception:
        assert isinstance(json.loads(text), dict)
    finally:
        shutil.copy(checkpoint / file, model / file)


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "BOOL"]), values),
        "shape": st.one_of(st.lists(st.integers(-1, 5), max_size=3), values),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 40), min_size=2, max_size=2), values),
    },
)
names = st.one_of(
    st.text(max_size=10),
    st.sampled_from(["txt_norm.weight", "transformer_blocks.0.attn.to_q.weight", "__metadata__", "img_in.weight"]),
)
headers = st.one_of(st.dictionaries(names, st.one_of(entries, values), max_size=5), values)


@given(header=headers, data=st.binary(max_size=40), cut=st.integers(-20, 20))
def test_any_header_is_read_or_refused(tmp_path_factory, header, data, cut):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(struct.pack("<Q", max(len(text) + (cut if cut > 15 else 0), 0)) + text + data)
    assert holds_transformer(file) in (True, False) and holds_language_model(file) in (True, False)
    for read in (read_header, lambda one: SingleFile(one).description):
        try:
            read(file)
        except RuntimeError as error:
            assert len(str(error)) < 1500
    for part in ("vlm", "generation_decoder", "vae"):
        try:
            open_part(file, part)
        except REFUSED as error:
            assert len(str(error)) < 1500


@given(place=st.integers(0, 4000), byte=st.integers(0, 255), length=st.integers(0, 10**6))
def test_a_changed_byte_or_a_cut_in_a_weight_file_loads_or_is_refused(model, checkpoint, place, byte, length):
    file = model / "generation_decoder" / "model.safetensors"
    content = bytearray((checkpoint / "generation_decoder" / "model.safetensors").read_bytes())
    content[place] = byte
    file.write_bytes(content[: length or None] if length < len(content) else content)
    try:
        load.load_mmdit(model)
    except REFUSED as error:
        assert len(str(error)) < 1500
    finally:
        shutil.copy(checkpoint / "generation_decoder" / "model.safetensors", file)


texts = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.text(st.characters(categories=["Cs", "Cc", "Cf", "Co", "Mn"]), max_size=10),
        st.sampled_from(
            [*ROW_TOKENS, "<image>", "<|im_end|>", "<|im_start|>", "\0", "{a|b}", "\N{GRINNING FACE}", "猫"]
        ),
    ),
    max_size=8,
).map("".join)


@given(text=texts, system=st.one_of(st.none(), texts), thought=texts, count=st.integers(0, 3))
def test_any_text_is_a_prompt_or_is_refused(checkpoint, text, system, thought, count):
    tokenizer = Tokenizer(checkpoint / "processor")
    try:
        prompts = branch_prompts(
            tokenizer, text, images=count, grid=2, system=system, thought=tokenizer.encode_thought(thought)
        )
        answered = generation_prompt(tokenizer, text, system=system or "", images=count, grid=2)
    except ValueError as error:
        assert "half a character" in str(error) or "placeholders" in str(error)
        return
    special = tokenizer.special
    for prompt in (prompts.conditional, answered):
        assert len(prompt.images) == count
        assert prompt.ids.count(special["<img>"]) == count + (prompt is prompts.conditional)
        assert sum(span.count for span in prompt.layout) == len(prompt.ids) - prompt.user_start
        assert prompt.ids.count(special["<|im_end|>"]) == 2, "a text has made structure"


@given(ids=st.lists(st.one_of(st.integers(0, 600), st.just(10**9)), max_size=20))
def test_any_tokens_become_text(checkpoint, ids):
    tokenizer = Tokenizer(checkpoint / "processor")
    assert isinstance(tokenizer.decode(ids), str)
    thought = tokenizer.decode_thought(ids)
    assert len(thought.ids) <= max(len(ids) - 1, 0)


@given(numbers=st.tuples(*[numbers] * 5))
def test_any_numbers_are_settings_of_generation_or_are_refused(numbers):
    try:
        config = GenerationConfig(*numbers)
    except ValueError as error:
        assert "expected" in str(error)
        return
    assert config.max_new_tokens >= 1 and config.beams >= 1 and math.isfinite(config.temperature)
    torch.Generator().manual_seed(config.seed)


@given(width=numbers, height=numbers, steps=numbers, seed=numbers, scales=st.tuples(numbers, numbers))
def test_any_numbers_are_a_request_or_are_refused(checkpoint, width, height, steps, seed, scales):
    try:
        request = ImageRequest("x", width, height, steps, seed, *scales)
        images.drawn_size(request.width, request.height)
        sigmas = sampling.flow_sigmas(request.steps)
    except ValueError as error:
        assert "expected" in str(error)
        return
    assert torch.isfinite(sigmas).all() and len(sigmas) == request.steps + 1


@given(steps=st.integers(-5, 300), denoise=numbers)
def test_any_denoise_is_a_schedule_or_is_refused(native, steps, denoise):
    from pack.native.sampler import flow_sigmas

    try:
        sigmas = flow_sigmas(steps, denoise)
    except ValueError as error:
        assert "expected" in str(error)
        return
    assert torch.isfinite(sigmas).all() and len(sigmas) in (0, steps + 1)


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    ranges=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6), st.one_of(st.none(), st.integers(16, 4096))),
)
def test_any_size_of_a_reference_fits_the_range(width, height, ranges):
    low, high, longest = ranges
    sizes = ReferenceSizes(min(low, high), max(low, high), longest)
    fitted = sizes.fit(width, height)
    assert all(side % 16 == 0 and side >= 16 for side in fitted)
    assert longest is None or max(fitted) <= longest


@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    orientation=numbers,
)
def test_any_picture_becomes_rgb(mode, size, orientation):
    image = Image.new(mode, size)
    if isinstance(orientation, int) and 0 <= orientation < 2**16:
        image.getexif()[0x0112] = orientation
    assert images.to_rgb(image).mode == "RGB"


@given(
    values=st.lists(st.floats(width=32), min_size=12, max_size=12),
    shape=st.sampled_from([(1, 2, 2, 3), (3, 1, 4, 1), (1, 3, 1, 4), (2, 1, 2, 3)]),
)
def test_any_values_of_an_image_become_levels(native, values, shape):
    from pack.native.images import to_pil_images

    batch = torch.tensor(values).reshape(shape)
    pictures = to_pil_images([batch], ReferenceSizes(256, 10**6, None))
    assert len(pictures) == shape[0] and all(numpy.asarray(picture).dtype == numpy.uint8 for picture in pictures)


COLUMNS = ("id", "prompt", "question", "task", "images", "width", "seed", "steps", "all_cfg", "think", "speed", "x")


@given(cells=st.dictionaries(st.sampled_from(COLUMNS), values, max_size=6), loose=st.booleans())
def test_any_row_of_a_list_is_a_job_or_is_refused(cells, loose):
    rows = pytest.importorskip("pack.internvl_u.batch.rows")
    jobs = importlib.import_module("pack.internvl_u.batch.jobs")
    try:
        job = jobs.read_job(rows.Row(1, cells, "", loose))
    except ValueError as error:
        assert "found" in str(error)
        return
    assert len(job.digest("model", [])) == 64 and len(job.file.split("/")) == 3
    assert jobs.Job(**json.loads(json.dumps(job.packed()))).file == job.file


@given(data=st.binary(max_size=300), ending=st.sampled_from(("jsonl", "csv", "tsv")))
def test_any_bytes_are_rows_of_a_list_or_rows_that_are_refused(tmp_path_factory, data, ending):
    rows = pytest.importorskip("pack.internvl_u.batch.rows")
    storage = importlib.import_module("pack.internvl_u.batch.storage")
    file = tmp_path_factory.getbasetemp() / f"fuzzed.{ending}"
    file.write_bytes(data)
    for row in rows.read_rows(storage.Store.of(str(file))):
        assert row.number > 0 and (row.cells or row.error or ending == "jsonl")
