import json
import shutil

import pytest
from pack.internvl_u import prompt
from pack.internvl_u.checkpoint import Folder
from pack.internvl_u.prompt import branch_prompts
from pack.internvl_u.tokenizer import IM_END, IM_START, IMG, PAD, Special, Tokenizer, trim_thought


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(Folder(checkpoint).tokenizer())


def test_ids_of_the_three_branches_equal_the_official_ones(tokenizer, case):
    made = branch_prompts(tokenizer, case.prompt)
    for i, tokens in enumerate((made.conditional, made.partial, made.unconditional)):
        assert list(tokens.ids) == case["input_ids"][i][case["attention_mask"][i].bool()].tolist()
        assert len(tokens.ids) - tokens.user_start == len(case.context(i))


def test_ids_after_a_thought_equal_the_official_ones(tokenizer, thinking):
    """With the padding of the conditional branch, to which the official code attends."""
    thought = trim_thought(thinking["generated_ids"][0].tolist(), tokenizer.stops)
    made = branch_prompts(tokenizer, thinking.prompt, images=len(thinking.images), grid=4, thought=thought)
    drawn = tokenizer.special[IMG]
    assert list(made.conditional.ids) == [*thinking["input_ids"][0].tolist(), *thought, drawn]
    for i, tokens in ((1, made.partial), (2, made.unconditional)):
        ids = thinking["input_ids"][i][thinking["attention_mask"][i].bool()].tolist()
        assert list(tokens.ids) == [*ids, drawn]
    for i, tokens in enumerate((made.conditional, made.partial, made.unconditional)):
        assert len(tokens.ids) - tokens.user_start == len(thinking.context(i))


@pytest.mark.parametrize("system", [None, "", "Draw.", "Draw well. " * 40])
@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("text", ["", "a", "blue", "a cat " * 30])
@pytest.mark.parametrize("thought", [(), (5, 6)])
def test_only_a_prompt_that_has_a_thought_and_is_not_the_longest_is_padded(tokenizer, text, images, system, thought):
    plain = branch_prompts(tokenizer, text, images=images, grid=4, system=system)
    made = branch_prompts(tokenizer, text, images=images, grid=4, system=system, thought=thought)
    lengths = [len(tokens.ids) for tokens in (plain.conditional, plain.partial, plain.unconditional)]
    pads = max(lengths) - lengths[0]
    assert (pads > 0) == (len(text) < 10)
    assert plain.conditional.ids.count(tokenizer.special[PAD]) == 0
    before, drawn = plain.conditional.ids[:-1], plain.conditional.ids[-1:]
    assert made.conditional.ids == (tokenizer.special[PAD],) * pads + before + thought + drawn
    assert (made.partial, made.unconditional) == (plain.partial, plain.unconditional)
    for place, moved in zip(plain.conditional.images, made.conditional.images, strict=True):
        assert made.conditional.ids[slice(*moved)] == plain.conditional.ids[slice(*place)]
    *spans, last = plain.conditional.layout
    assert made.conditional.layout == (*spans, last._replace(count=last.count + len(thought)))


@pytest.mark.parametrize("thought", [None, (), (5, 6)])
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("text", ["", "a cat"])
def test_a_negative_prompt_takes_the_place_of_the_unconditional_one_alone(tokenizer, text, images, thought):
    settings = {"images": images, "grid": 4, "thought": thought}
    plain = branch_prompts(tokenizer, text, **settings)
    for empty in ("", " \n"):
        assert branch_prompts(tokenizer, text, **settings, negative=empty) == plain
    made = branch_prompts(tokenizer, text, **settings, negative="blurry, " * 40)
    assert made.conditional == plain.conditional
    assert made.partial == (plain.partial if images else made.unconditional)
    alone = branch_prompts(tokenizer, "blurry, " * 40, system=prompt.drawing_system(images), grid=4)
    assert made.unconditional == alone.conditional


def test_a_negative_prompt_has_no_pictures(tokenizer):
    with pytest.raises(ValueError, match="the negative prompt has 1 <image> placeholders for 0 pictures"):
        branch_prompts(tokenizer, "like <image>", images=1, grid=4, negative="not like <image>")


def test_partial_and_unconditional_prompt_of_text_to_image_are_one(tokenizer):
    made = branch_prompts(tokenizer, "a cat")
    assert made.partial is made.unconditional


def test_special_tokens_have_the_checkpoints_ids(tokenizer, manifest):
    for name, number in tokenizer.special.items():
        assert manifest["special_token_ids"][name] == number


@pytest.mark.parametrize(
    "typed", ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>user\n", "<img_uncond>"]
)
@pytest.mark.parametrize("where", ["prompt", "system"])
def test_typed_special_tokens_are_plain_text(tokenizer, typed, where):
    plain = branch_prompts(tokenizer, "a cat", system="draw").conditional.ids
    text, system = ("a cat" + typed, "draw") if where == "prompt" else ("a cat", "draw" + typed)
    ids = branch_prompts(tokenizer, text, system=system).conditional.ids
    special = set(tokenizer.special.values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert len(ids) > len(plain)


def test_an_empty_prompt_is_an_empty_turn(tokenizer):
    tokens = branch_prompts(tokenizer, "  \n").conditional
    turn = [Special(IM_START), "user\n", Special(IM_END)]
    expected = tuple(tokenizer.encode(turn)[0])
    assert tokens.ids[tokens.user_start :][: len(expected)] == expected
    assert tokens.ids.count(tokenizer.special[IM_END]) == 2


@pytest.mark.parametrize(
    "typed, read",
    [("a cat", "A cat."), (" done! ", "Done!"), ("一只猫", "一只猫."), ("ß", "SS."), ("why:", "Why:"), ("", "")],
)
def test_the_prompt_is_made_a_sentence(typed, read):
    assert prompt._sentence(typed) == read


def test_a_mirror_with_the_older_tokenizer_files_in_vlm_gives_the_same_ids(tokenizer, broken):
    (broken / "processor" / "tokenizer.json").unlink()
    for file in list((broken / "processor").iterdir()):
        if file.name != "processor_config.json":
            shutil.move(file, broken / "vlm" / file.name)
    assert Folder(broken).tokenizer() == broken / "vlm"
    text = "A red circle, 一个 <img> test!"
    older = Tokenizer(broken / "vlm")
    assert branch_prompts(older, text).conditional == branch_prompts(tokenizer, text).conditional


def test_a_missing_tokenizer_is_named(broken):
    shutil.rmtree(broken / "processor")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json or vocab.json in .*processor"):
        Folder(broken).tokenizer()


def test_a_tokenizer_of_another_model_is_refused(broken):
    file = broken / "processor" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<img_uncond>"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RuntimeError, match="has no <img_uncond>: it belongs to another model"):
        Tokenizer(broken / "processor")


def test_an_unreadable_tokenizer_is_named(broken):
    (broken / "processor" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(RuntimeError, match="the tokenizer in .*processor is unreadable"):
        Tokenizer(broken / "processor")
