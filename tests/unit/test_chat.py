"""A conversation: its value, the prompt made of it, what is left out, and what a message does."""

import contextlib
import io
import itertools
import json
import sys
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch
from pack.internvl_u import chat_console, encoder, reply
from pack.internvl_u.__main__ import main
from pack.internvl_u.chat import History, Picture, Turn
from pack.internvl_u.checkpoint import Folder
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.prompt import SYSTEM_ANSWER, branch_prompts, generation_prompt
from pack.internvl_u.tokenizer import IM_END, IM_START, IMG, IMG_CONTEXT, Thought, Tokenizer
from PIL import Image

RED, BLUE = (Image.new("RGB", (48, 32), colour) for colour in ("red", "blue"))
TALK = History(
    (
        Turn("user", "draw a cat"),
        Turn("assistant", "", (Picture(RED, "cat.png"),), "a cat on a mat"),
        Turn("user", "what colour is it", (Picture(BLUE, "dog.png"),)),
        Turn("assistant", "It is red."),
    )
)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(Folder(checkpoint).tokenizer())


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline(checkpoint)


# A value


def test_a_history_is_never_changed():
    with pytest.raises(FrozenInstanceError):
        TALK.turns = ()
    longer = TALK.add(Turn("user", "and now"))
    assert len(TALK) == 4 and len(longer) == 5 and longer.branch(4) == TALK
    assert TALK.clear() == TALK.branch(0) == History() and replace(TALK) == TALK


@pytest.mark.parametrize("turns", [-1, 5])
def test_a_branch_from_nowhere_is_refused(turns):
    with pytest.raises(ValueError, match=f"{turns} turns found, 0 to 4 expected"):
        TALK.branch(turns)


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role 'system' found, one of user, assistant expected"):
        Turn("system", "x")


def test_json_keeps_everything_but_the_pictures_themselves():
    read = History.from_json(TALK.to_json(), {"cat.png": RED, "dog.png": BLUE}.__getitem__)
    assert read == TALK and "cat.png" in TALK.to_json()
    assert History.from_json("", None) == History.from_json(" \n", None) == History()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds a list, a JSON object expected"),
        ("{", "is not readable as JSON"),
        ('{"turns": 1}', "turns 1 found, a valid list expected"),
        ('{"turns": [{"role": "system"}]}', "turns.0.role 'system' found, 'user' or 'assistant' expected"),
        ('{"turns": [{"role": "user", "text": 5}]}', "turns.0.text 5 found, a valid string expected"),
        ('{"turns": [{"role": "user", "pictures": [1]}]}', "turns.0.pictures.0 1 found"),
        ("x" * 2_000_000, "2000000 characters found, 1000000 expected at most"),
    ],
)
def test_json_that_is_no_conversation_is_refused(text, message):
    with pytest.raises(ValueError) as error:
        History.from_json(text, None)
    assert message in str(error.value)


def test_markdown_tells_texts_thoughts_and_the_files_of_pictures():
    assert TALK.to_markdown() == (
        "**You**\n\ndraw a cat\n\n**InternVL-U**\n\n> a cat on a mat\n\n![cat.png](<cat.png>)\n\n"
        "**You**\n\nwhat colour is it\n\n![dog.png](<dog.png>)\n\n**InternVL-U**\n\nIt is red.\n"
    )
    assert History().to_markdown() == ""


# The prompt


def chat_template(tokenizer, turns, grid=2):
    """The ids by hand: transformers' chat template of Qwen, and InternVL's pictures."""
    special = tokenizer.special
    picture = [special[IMG], *[special[IMG_CONTEXT]] * grid**2, special["</img>"]]
    ids = []
    for role, *pieces in turns:
        ids.append(special[IM_START])
        pieces = [f"{role}\n" + pieces[0], *pieces[1:]] if pieces and pieces[0] is not None else [f"{role}\n", *pieces]
        for piece in pieces:
            ids += picture if piece is None else tokenizer.encode([piece])[0]
        ids += [special[IM_END], *tokenizer.encode(["\n"])[0]]
    return (*ids, special[IM_START], *tokenizer.encode(["assistant\n"])[0])


def test_the_prompt_of_a_conversation_is_the_chat_template(tokenizer):
    made = generation_prompt(tokenizer, "and how large", system="Talk.", images=1, grid=2, earlier=TALK.turns)
    expected = chat_template(
        tokenizer,
        [
            ("system", "Talk."),
            ("user", "Draw a cat."),
            ("assistant", None),
            ("user", None, "\nwhat colour is it."),
            ("assistant", "It is red."),
            ("user", None, "\nand how large."),
        ],
    )
    assert made.ids == expected
    context = tokenizer.special[IMG_CONTEXT]
    assert all(set(made.ids[slice(*image)]) == {context} for image in made.images) and len(made.images) == 3
    assert made.ids.count(context) == 3 * 4


def test_the_prompt_of_words_equals_transformers_chat_template(tokenizer):
    """Rendered by its own code from the template that Qwen's tokenizers carry, for turns without pictures."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    said = [("system", "Talk."), ("user", "Hello, you!"), ("assistant", "Hello.\nHow are you?"), ("user", "Well.")]
    messages = [{"role": role, "content": text} for role, text in said]
    (rendered,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
    turns = tuple(Turn(role, text) for role, text in said[1:-1])
    made = generation_prompt(tokenizer, "Well.", system="Talk.", earlier=turns)
    tokenizer._tokenizer.encode_special_tokens = False
    try:
        assert list(made.ids) == tokenizer._tokenizer.encode(rendered, add_special_tokens=False).ids
    finally:
        tokenizer._tokenizer.encode_special_tokens = True


def test_without_a_conversation_nothing_changes(tokenizer):
    plain = generation_prompt(tokenizer, "hi", system="Talk.")
    assert generation_prompt(tokenizer, "hi", system="Talk.", earlier=()) == plain
    assert branch_prompts(tokenizer, "a cat", images=1, grid=2, earlier=()) == branch_prompts(
        tokenizer, "a cat", images=1, grid=2
    )


@pytest.mark.parametrize("thought", [None, (5, 6)])
def test_only_the_conditional_branch_reads_the_conversation_and_hands_on_its_last_turn(tokenizer, thought):
    plain = branch_prompts(tokenizer, "a cat " * 20, images=1, grid=2, thought=thought)
    made = branch_prompts(tokenizer, "a cat " * 20, images=1, grid=2, thought=thought, earlier=TALK.turns)
    assert (made.partial, made.unconditional) == (plain.partial, plain.unconditional)
    now, before = made.conditional, plain.conditional
    assert now.ids[now.user_start :] == before.ids[before.user_start :] and now.layout == before.layout
    assert now.ids[: before.user_start] == before.ids[: before.user_start]
    assert len(now.images) == 3 and len(now.ids) > len(before.ids)


def test_a_turn_whose_pictures_were_left_out_loses_their_placeholders(tokenizer):
    turn = Turn("user", "the hat of <image> on <image>", (Picture(RED), Picture(BLUE)))
    (words,) = History((turn,)).without_pictures().turns
    made = generation_prompt(tokenizer, "x", system="s", grid=2, earlier=(words,))
    assert not made.images
    assert len(generation_prompt(tokenizer, "x", system="s", grid=2, earlier=(turn,)).images) == 2


def test_special_tokens_in_earlier_turns_are_plain_text(tokenizer):
    def specials(said):
        made = generation_prompt(tokenizer, "x", system="s", earlier=(Turn("user", said), Turn("assistant", said)))
        return [i for i in made.ids if i in set(tokenizer.special.values())]

    assert specials("hi <img><|im_end|><IMG_CONTEXT>") == specials("hi")


# What fits


def test_the_oldest_messages_go_first_each_with_its_answers():
    turns = [Turn("user", "1"), Turn("assistant", "1"), Turn("assistant", "1"), Turn("user", "2"), Turn("user", "3")]
    history = History(tuple(turns))
    assert history.without_oldest().turns == tuple(turns[3:])
    assert history.without_oldest().without_oldest().turns == tuple(turns[4:])
    assert [len(history.fit(len, allowed)) for allowed in (5, 4, 2, 1, 0)] == [5, 2, 2, 1, 0]


def long_talk(count):
    return History(
        tuple(turn for i in range(count) for turn in (Turn("user", f"question {i}"), Turn("assistant", "word " * 30)))
    )


def test_a_conversation_beyond_the_context_is_cut_at_its_beginning_and_that_is_said(pipeline, caplog):
    talk, heard = long_talk(120), []
    config = GenerationConfig(3)
    written = pipeline.generate("hi", (), SYSTEM_ANSWER, config, heard.append, talk)
    assert written and len(caplog.records) <= 2
    (said,) = [record.message for record in caplog.records if "left out" in record.message]
    left_out = int(said.split("the first ")[1].split()[0])
    assert left_out % 2 == 0 and 0 < left_out < 240 and "of 240 turns" in said
    caplog.clear()
    fitting = History(talk.turns[left_out:])
    assert pipeline.generate("hi", (), SYSTEM_ANSWER, config, None, fitting) == written
    assert not [record for record in caplog.records if "left out" in record.message]


def test_room_is_kept_for_what_will_be_written(pipeline):
    model = pipeline._mllm()
    allowed = model.language_model.config.max_position_embeddings

    def build(history):
        return generation_prompt(pipeline.encoder.tokenizer, "hi", system="s", earlier=history.turns)

    kept = {}
    for new in (0, 512, 10**6):
        fitting, _ = encoder.fit_history(model, long_talk(120), build, new)
        kept[new] = len(build(fitting).ids)
        assert kept[new] <= allowed - min(new, allowed // 4)
    assert kept[0] > kept[512] > kept[10**6] > allowed // 2


def test_drawing_leaves_out_what_does_not_fit(pipeline, caplog):
    request = ImageRequest("a cat", 32, 32, 1, history=long_talk(120))
    assert pipeline.draw(request).size == (32, 32)
    assert "turns of the conversation were left out" in caplog.text


def test_what_was_said_changes_answer_and_picture_and_pictures_are_read_in_their_place(pipeline):
    contexts = {
        name: pipeline.encode_prompt(ImageRequest("a cat", images=(RED,), history=history))
        for name, history in {
            "none": History(),
            "talk": TALK,
            "other": History(tuple(replace(turn, pictures=turn.pictures and (Picture(BLUE),)) for turn in TALK.turns)),
        }.items()
    }
    first = {name: context.conditional[0] for name, context in contexts.items()}
    assert first["none"].shape == first["talk"].shape == first["other"].shape
    for one, other in itertools.combinations(first.values(), 2):
        assert not torch.equal(one, other)
    for name in ("talk", "other"):
        assert torch.equal(contexts[name].unconditional[0], contexts["none"].unconditional[0])
        assert torch.equal(contexts[name].partial[0], contexts["none"].partial[0])


# A message


class Speaker:
    """Writes what it is told to, and remembers what it was asked."""

    def __init__(self, tokenizer, *written):
        self.tokenizer, self.written, self.asked = tokenizer, list(written), []

    def write(self, text, system, images, history, *, thinks):
        self.asked.append(("think" if thinks else "answer", text, tuple(images), history))
        return self.tokenizer.encode([self.written.pop(0)])[0] + [self.tokenizer.special[IM_END]]

    def draw(self, text, images, history, thought):
        self.asked.append(("draw", text, tuple(images), history, thought))
        return Picture(BLUE, "drawn.png")


def done(tokenizer, action, reads=reply.WHOLE, pictures=(), history=TALK, written=("Yes.",)):
    speaker = Speaker(tokenizer, *written)
    after = reply.reply(speaker, history, reply.Message("go on", pictures, action, reads))
    assert after.branch(len(history)) == history and after.turns[-2] == Turn("user", "go on", pictures)
    return speaker.asked, after.turns[-1]


def test_an_answer_is_words_after_the_whole_conversation(tokenizer):
    for action in (reply.ANSWER, reply.DECIDE):
        asked, turn = done(tokenizer, action)
        assert asked == [("answer", "go on", (), TALK)] and turn == Turn("assistant", "Yes.")


def test_a_model_that_begins_a_picture_by_itself_draws_it(tokenizer):
    speaker = Speaker(tokenizer)
    words = tokenizer.encode(["a blue dog, large."])[0]
    speaker.write = lambda *_, **__: [*words, tokenizer.special[IMG]]
    after = reply.reply(speaker, TALK, reply.Message("a dog", (Picture(RED, "r.png"),)))
    (asked,) = speaker.asked
    assert asked[:4] == ("draw", "a dog", (RED,), TALK) and asked[4].ids == tuple(words[:-1])
    assert after.turns[-1] == Turn("assistant", "", (Picture(BLUE, "drawn.png"),), asked[4])
    answered = reply.reply(speaker, TALK, reply.Message("a dog", action=reply.ANSWER))
    assert answered.turns[-1].text == "a blue dog, large." and not answered.turns[-1].pictures


def test_an_edit_is_of_the_last_picture_and_reads_the_words_alone(tokenizer):
    asked, turn = done(tokenizer, reply.EDIT)
    assert asked == [("draw", "go on", (BLUE,), TALK.without_pictures(), "")]
    assert turn == Turn("assistant", "", (Picture(BLUE, "drawn.png"),))
    asked, _ = done(tokenizer, reply.EDIT, pictures=(Picture(RED, "new.png"),))
    assert asked[0][2] == (RED,)
    asked, _ = done(tokenizer, reply.EDIT, history=TALK.branch(2))
    assert asked[0][2] == (RED,)


def test_thinking_comes_before_the_picture_with_the_same_context(tokenizer):
    for action, images in ((reply.THINK_DRAW, ()), (reply.THINK_EDIT, (BLUE,))):
        asked, turn = done(tokenizer, action, written=("a plain scene here",))
        assert [one[0] for one in asked] == ["think", "draw"]
        assert asked[0][1:4] == asked[1][1:4] and asked[0][2] == images
        assert isinstance(asked[1][4], Thought) and turn.thought == asked[1][4]


@pytest.mark.parametrize("reads, history", [(reply.WORDS, TALK.without_pictures()), (reply.LAST_PICTURE, History())])
def test_what_is_read_can_be_less(tokenizer, reads, history):
    assert done(tokenizer, reply.ANSWER, reads)[0] == [("answer", "go on", (BLUE,), history)]
    assert done(tokenizer, reply.EDIT, reads)[0] == [("draw", "go on", (BLUE,), history, "")]
    assert done(tokenizer, reply.DRAW, reads)[0] == [("draw", "go on", (), history, "")]


def test_without_a_picture_there_is_nothing_to_edit(tokenizer):
    with pytest.raises(ValueError, match="no picture found to edit"):
        done(tokenizer, reply.EDIT, history=TALK.without_pictures())


def test_a_message_says_what_to_do_by_a_known_name():
    with pytest.raises(ValueError, match="action 'dance' found, one of decide by itself, answer, draw"):
        reply.Message("x", action="dance")
    with pytest.raises(ValueError, match="reads 'all' found, one of whole conversation"):
        reply.Message("x", reads="all")


def test_a_picture_that_stays_connected_is_shown_once():
    pictures = (Picture(RED, "cat.png"), Picture(BLUE, "new.png"))
    assert reply.new_pictures(TALK, "x", pictures) == pictures[1:]
    assert reply.new_pictures(TALK, "the <image> again", pictures) == pictures


# The command line


@pytest.fixture
def command(monkeypatch):
    """Runs the command line in this process, with lines on a stdin that is no terminal."""

    def run(lines, *options):
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["chat", *map(str, options)])
        return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())

    return run


def test_the_command_line_talks_through_a_pipe(command, checkpoint, tmp_path):
    saved = tmp_path / "talk.md", tmp_path / "talk.json"
    lines = [
        "/ask hello",
        "/draw a cat",
        "",
        "/edit make it blue",
        *(f"/save {file}" for file in saved),
        "/clear",
        "/quit",
        "x",
    ]
    sizes = ["--width", 32, "--height", 32, "--steps", 1, "--max-new-tokens", 5]
    ran = command(lines, "--model", checkpoint, "--out", tmp_path, *sizes)
    assert ran.returncode == 0, ran.stderr
    first, second = (tmp_path / f"picture_{number:03}.png" for number in (1, 2))
    assert ran.stdout.splitlines()[-2:] == [str(first), str(second)]
    with Image.open(first) as image:
        assert image.size == (32, 32)
    turns = json.loads(saved[1].read_text(encoding="utf-8"))["turns"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    assert ran.stdout.startswith(turns[1]["text"]) and turns[3]["pictures"] == [str(first)]
    assert f"![{second}](<{second}>)" in saved[0].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dance", "/dance found, one of /ask, /draw, /edit, /think"),
        ("/draw", "a command without a text found"),
        ("/edit make it blue", "no picture found to edit"),
        ("/image nothing.png", "/image nothing.png is not readable as a picture"),
        ("/save talk.txt", "/save talk.txt found, a name ending in .md or .json expected"),
    ],
)
def test_a_wrong_line_of_a_pipe_ends_with_one_sentence(command, checkpoint, tmp_path, line, message):
    ran = command([line], "--model", checkpoint, "--out", tmp_path)
    lines = [one for one in ran.stderr.splitlines() if one.startswith("internvl_u: ")]
    assert ran.returncode == 1 and len(lines) == 1 and message in lines[0], ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_missing_folder_is_told_before_anything_is_said(command, checkpoint, tmp_path):
    ran = command(["hello"], "--model", checkpoint, "--out", tmp_path / "none")
    assert ran.returncode == 1 and "none for --out. Make it first." in ran.stderr and not ran.stdout


def test_on_a_terminal_a_wrong_line_is_told_and_the_conversation_goes_on(pipeline, tmp_path, monkeypatch, capsys):
    class Terminal:
        lines = iter(["/dance\n", "/draw a cat\n", "/quit\n"])

        def isatty(self):
            return True

        def readline(self):
            return next(self.lines, "")

    monkeypatch.setattr(sys, "stdin", Terminal())
    parser = chat_console.argparse.ArgumentParser()
    chat_console.add_arguments(parser)
    options = parser.parse_args(["--out", str(tmp_path), "--steps", "1", "--width", "32", "--height", "32"])
    chat_console.run(options, pipeline)
    told = capsys.readouterr()
    assert "/dance found" in told.err and told.out.splitlines() == [str(tmp_path / "picture_001.png")]
