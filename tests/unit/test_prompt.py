import json
import shutil

import pytest
from pack.internvl_u import prompt
from pack.internvl_u.prompt import Tokenizer, branches, find_tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(find_tokenizer(checkpoint))


def test_ids_of_the_three_branches_equal_the_official_ones(tokenizer, case):
    made = branches(tokenizer, case.prompt)
    for i, tokens in enumerate((made.conditional, made.partial, made.unconditional)):
        assert list(tokens.ids) == case["input_ids"][i][case["attention_mask"][i].bool()].tolist()
        assert len(tokens.ids) - tokens.user == len(case.context(i))


def test_partial_and_unconditional_prompt_of_text_to_image_are_one(tokenizer):
    made = branches(tokenizer, "a cat")
    assert made.partial is made.unconditional


def test_special_tokens_have_the_checkpoints_ids(tokenizer, manifest):
    for name, number in tokenizer.special.items():
        assert manifest["special_token_ids"][name] == number


@pytest.mark.parametrize(
    "typed", ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>user\n", "<img_uncond>"]
)
@pytest.mark.parametrize("where", ["prompt", "system"])
def test_typed_special_tokens_are_plain_text(tokenizer, typed, where):
    plain = branches(tokenizer, "a cat", system="draw").conditional.ids
    text, system = ("a cat" + typed, "draw") if where == "prompt" else ("a cat", "draw" + typed)
    ids = branches(tokenizer, text, system=system).conditional.ids
    special = set(tokenizer.special.values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert len(ids) > len(plain)


def test_an_empty_prompt_is_an_empty_turn(tokenizer):
    tokens = branches(tokenizer, "  \n").conditional
    turn = [prompt.Special(prompt.IM_START), "user\n", prompt.Special(prompt.IM_END)]
    expected = tuple(tokenizer.encode(turn)[0])
    assert tokens.ids[tokens.user :][: len(expected)] == expected
    assert tokens.ids.count(tokenizer.special[prompt.IM_END]) == 2


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
    assert find_tokenizer(broken) == broken / "vlm"
    text = "A red circle, 一个 <img> test!"
    older = Tokenizer(broken / "vlm")
    assert branches(older, text).conditional == branches(tokenizer, text).conditional


def test_a_missing_tokenizer_is_named(broken):
    shutil.rmtree(broken / "processor")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json or vocab.json in .*processor"):
        find_tokenizer(broken)


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
