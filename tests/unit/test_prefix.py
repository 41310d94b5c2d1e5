"""What has been read is not read again, and changes no bit."""

import contextlib

import pytest
import torch
from pack.internvl_u import encoder, prompt
from pack.internvl_u.chat import History, Picture, Turn
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.images import to_rgb
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.prefix import Piece, PrefixCache
from pack.internvl_u.tokenizer import Thought
from PIL import Image

LONG = "a wish that is long enough to need no padding before the thought that follows it, in any of the branches"


@pytest.fixture
def pipeline(checkpoint):
    return Pipeline(checkpoint)


@pytest.fixture
def picture(golden):
    return to_rgb(Image.open(golden("edit_one").images[0]))


@pytest.fixture
def read(pipeline, count_reads):
    return count_reads(pipeline._mllm())


def contexts(pipeline, request):
    made = pipeline.encode_prompt(request)
    return [made.conditional[0], made.unconditional[0], *([made.partial[0]] if made.partial else [])]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_think_and_then_encode_read_prompt_and_pictures_once(pipeline, picture, read, images):
    pictures = tuple(picture.rotate(90 * i) for i in range(images))
    request = ImageRequest(LONG, images=pictures)
    thought = pipeline.think(request, GenerationConfig(12))
    prompts = sum(one for one in read if one != "image")
    assert read.count("image") == images
    read.clear()
    pipeline.encode_prompt(ImageRequest(LONG, images=pictures, thought=thought))
    assert "image" not in read
    tokens = pipeline.encoder.tokenizer
    grid = pipeline._mllm().vision.grid
    made = prompt.branch_prompts(tokens, LONG, images=images, grid=grid, thought=thought.ids)
    assert len(made.conditional.ids) == prompts + len(thought.ids) + 1  # no pads
    others = [made.partial, made.unconditional] if images else [made.unconditional]
    # Of the prompt nothing; of the others, which begin with the same system turn, the rest.
    assert sorted(read) == sorted([len(thought.ids) + 1, *(len(one.ids) - one.user_start for one in others)])


def test_of_a_longer_thought_only_the_new_tokens_are_read(pipeline, read):
    size, ids = prompt.THOUGHT_PIECE, [5 + i % 7 for i in range(600)]

    def encode(length):
        read.clear()
        pipeline.encode_prompt(ImageRequest(LONG, thought=Thought("x", ids[:length])))
        return list(read)

    encode(size + 20)
    assert encode(size + 40) == [41]  # the piece that has grown, and <img>
    assert encode(size + 40) == []
    assert encode(2 * size + 5) == [size, 6]
    ids[3] = 9
    assert encode(2 * size + 5) == [size, size, 6]


def test_a_conversation_is_read_on_from_where_it_ended(pipeline, picture, read):
    history = History()
    for text in ("what is this", "and that", "why"):
        read.clear()
        turn = Turn("user", text, (Picture(picture),) if not history.turns else ())
        images = [one.image for one in turn.pictures]
        said = pipeline.answer(text, images, config=GenerationConfig(4), history=history)
        history = history.add(turn, Turn("assistant", said))
        lengths = [one for one in read if one != "image"]
        if len(history) > 2:
            assert "image" not in read
            assert len([one for one in lengths if one > 1]) <= 2 and sum(lengths) < 60  # the last answer, the new turn


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("thought", ["", "first a circle, then a square"])
def test_no_bit_depends_on_what_was_read_before(checkpoint, picture, images, thought):
    request = ImageRequest(LONG, images=(picture,) * images, thought=thought)
    expected = contexts(Pipeline(checkpoint), request)
    warm = Pipeline(checkpoint)
    before = ImageRequest(LONG, images=(picture,) * images)
    warm.think(before, GenerationConfig(5))
    warm.answer("something else", [picture] * images, config=GenerationConfig(3))
    contexts(warm, ImageRequest(LONG, images=(picture,) * images, thought="first a circle"))
    for _ in range(2):
        assert all(map(torch.equal, contexts(warm, request), expected))
    config = GenerationConfig(12)
    assert warm.think(before, config).ids == Pipeline(checkpoint).think(before, config).ids


def test_another_picture_is_another_text(pipeline, picture):
    first, second = (
        pipeline.encode_prompt(ImageRequest(LONG, images=(image,))).conditional[0]
        for image in (picture, picture.rotate(180))
    )
    assert not torch.allclose(first, second, atol=1e-3)


def piece(tokens, fill=0.0):
    keys = torch.full((1, 1, 1, tokens, 4), fill)
    return Piece(keys, keys.clone(), torch.full((tokens, 4), fill), torch.full((1, 1, 2), fill))


BYTES = sum(one.nbytes for one in piece(4))


def test_memory_is_bounded_and_the_latest_used_is_kept():
    kept = PrefixCache(3 * BYTES)
    digests = [kept.after(kept.start(), [i], ()) for i in range(4)]
    for digest in digests[:3]:
        kept.put(digest, piece(4))
    kept.touch([digests[0]])
    kept.put(digests[3], piece(4))
    assert [kept.get(digest) is not None for digest in digests] == [True, False, True, True]
    assert kept.bytes == 3 * BYTES
    kept.put(kept.after(kept.start(), [9], ()), piece(100))  # larger than all room: nothing is given up for it
    assert kept.bytes == 3 * BYTES
    kept.clear()
    assert kept.bytes == 0 and kept.get(digests[0]) is None


def test_the_end_of_a_prompt_goes_before_its_beginning():
    kept = PrefixCache(2 * BYTES)
    first = kept.after(kept.start(), [1], ())
    second = kept.after(first, [2], ())
    kept.put(first, piece(4))
    kept.put(second, piece(4))
    kept.touch([first, second])
    kept.put(kept.after(first, [3], ()), piece(4))
    assert kept.get(first) is not None and kept.get(second) is None


def test_what_other_weights_have_made_is_not_found():
    kept = PrefixCache()
    kept.put(kept.after(kept.start(), [1], ()), piece(4))
    kept.weights = "a LoRA"
    assert kept.get(kept.after(kept.start(), [1], ())) is None
    kept.weights = ""
    assert kept.get(kept.after(kept.start(), [1], ())) is not None


def test_ids_and_pictures_are_told_apart():
    kept = PrefixCache()
    start, picture = kept.start(), torch.zeros(1, 2, 3)
    digests = {
        kept.after(start, [1, 2], ()),
        kept.after(kept.after(start, [1], ()), [2], ()),
        kept.after(start, [12], ()),
        kept.after(start, [1, 2], [picture]),
        kept.after(start, [1, 2], [picture + 1]),
        kept.after(start, [1, 2], [picture, picture]),
        start,
    }
    assert len(digests) == 7
    assert kept.after(start, [1, 2], [picture]) == kept.after(start, (1, 2), [picture.clone()])


def test_how_a_piece_is_computed_depends_on_it_alone(pipeline, monkeypatch):
    """With the length of the prompt as well, a kept piece could have other bits than the same one of another prompt."""
    rows = []
    monkeypatch.setattr(encoder, "fitting_threads", lambda _, count: rows.append(count) or contextlib.nullcontext())
    pipeline.encode_prompt(ImageRequest("a cat"))
    pipeline._kept.clear()
    short, rows[:] = list(rows), []
    pipeline.encode_prompt(ImageRequest("a cat " * 100))
    assert short[0] == rows[0] and short[1] != rows[1]
