import json

import pytest
from pack.internvl_u.series import file_name, read_prompts, read_scales, scale_grid


def test_each_line_that_is_not_empty_is_a_prompt():
    found = read_prompts("\n a red circle\r\n\n  \nein blaues Quadrat, groß\n")
    assert [one.prompt for one in found] == ["a red circle", "ein blaues Quadrat, groß"]
    assert [one.name for one in found] == ["a_red_circle", "ein_blaues_Quadrat_groß"]
    assert [one.seed for one in found] == [0, 1]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_is_read_by_its_columns_in_any_order(delimiter, mark):
    rows = [["Name", "prompt", "other", "seed"], ["cat", '"a cat, black; ""big"""', "x", "7"], ["", "a dog", "", ""]]
    found = read_prompts(mark + "\n".join(delimiter.join(row) for row in rows))
    assert found == [('a cat, black; "big"', "cat", 7), ("a dog", "a_dog", 1)]


def test_a_table_of_one_column_and_a_prompt_over_several_lines_are_read():
    found = read_prompts('prompt\n"a cat\non a mat"\na dog')
    assert [one.prompt for one in found] == ["a cat\non a mat", "a dog"]


def test_a_first_line_that_only_speaks_of_a_prompt_is_one():
    assert [one.prompt for one in read_prompts("a prompt, please\nprompt me well")] == [
        "a prompt, please",
        "prompt me well",
    ]


def test_json_may_hold_texts_and_objects():
    text = json.dumps(["a cat", {"prompt": "a dog", "name": "dog", "seed": 5, "more": []}, {"prompt": "猫"}])
    assert read_prompts(text) == [("a cat", "a_cat", 0), ("a dog", "dog", 5), ("猫", "猫", 2)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "0 prompts found"),
        (" \n ", "0 prompts found"),
        ("prompt,name", "0 prompts found"),
        ("prompt,name\na,b,c", r"line 2: 3 columns found, 2 expected"),
        ("prompt,name\n\n,b", "line 3: no prompt found"),
        ("prompt,seed\na,x", "line 2: seed 'x' found"),
        ("prompt,seed\na,-1", "line 2: seed '-1' found"),
        ("prompt,seed\na,18446744073709551616", "line 2: seed '18446744073709551616' found"),
        ('prompt,name\n"a"b,c', "line 2: .* a table with columns prompt, name expected"),
        ('prompt,name\n"a', "line 2: .* a table with columns"),
        ('["a",\n 5 6]', "line 2: no JSON found"),
        ("[" * 100_000, "no JSON found"),
        ('{"prompt": "a"}', "JSON of dict found"),
        ('["a", 5]', "entry 2: int found"),
        ('[{"name": "a"}]', "entry 1: no prompt found"),
        ('[""]', "entry 1: no prompt found"),
        ('[{"prompt": ["a"]}]', "entry 1: prompt of type list found"),
        ('[{"prompt": "a", "seed": true}]', "entry 1: seed of type bool found"),
        ('[{"prompt": "a", "seed": "²"}]', "entry 1: seed '²' found"),
        ("a\n" * 10_001, "10001 prompts found"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_or_entry(text, told):
    with pytest.raises(ValueError, match=told) as caught:
        read_prompts(text)
    assert "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red circle!", "a_red_circle"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\windows\\x", "C_windows_x"),
        ("%date:yyyy%", "date_yyyy"),
        ("CON", "CON_"),
        ("lpt1", "lpt1_"),
        ("...", "picture"),
        ("", "picture"),
        ("一只红色的猫。", "一只红色的猫"),
        ("word " * 30, "_".join(["word"] * 12)),
        ("x" * 100, "x" * 60),
        ("one\ntwo\x00three", "one_two_three"),
    ],
)
def test_a_name_is_safe_for_every_file_system(text, name):
    assert file_name(text) == name


def test_no_two_names_are_equal_in_capitals_or_not():
    names = [one.name for one in read_prompts("a cat\nA Cat\na cat!\na cat 2")]
    assert names == ["a_cat", "A_Cat_2", "a_cat_3", "a_cat_2_2"]
    assert len({name.lower() for name in names}) == len(names)


@pytest.mark.parametrize("text", ["4.5, 3.5, 2", "4.5 3.5 2", "4.5;3.5\n2", " 4.5 ,3.5,\t2.0 "])
def test_scales_are_read_with_any_separator(text):
    assert read_scales(text, "all_cfg") == [4.5, 3.5, 2.0]


@pytest.mark.parametrize("text", ["", " ", "a", "1, b", "-1", "101", "nan", "inf", "1,,", "1e999"])
def test_a_scale_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="all_cfg: .* found, numbers from 0 to 100"):
        read_scales(text, "all_cfg")


def test_a_grid_goes_row_by_row_and_has_an_end():
    assert scale_grid([4.5, 3.5], [1.0, 2.0]) == [(4.5, 1.0), (3.5, 1.0), (4.5, 2.0), (3.5, 2.0)]
    with pytest.raises(ValueError, match="441 pairs of scales found, 400 expected"):
        scale_grid([1.0] * 21, [1.0] * 21)
