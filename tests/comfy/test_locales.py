"""The nodes' texts in other languages: complete, up to date, in the language that they say they are, and served."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest
from pack.tools import locales

ROOT = Path(__file__).resolve().parents[2]
HAN, KANA, HANGUL = "\u4e00-\u9fff", "\u3040-\u30ff", "\uac00-\ud7af"
SCRIPTS = {"zh": HAN, "zh-TW": HAN, "ja": HAN + KANA, "ko": HANGUL}
OF_THE_OTHER = {"zh": set("圖張說問沒這個來對時為"), "zh-TW": set("图张说问没这个来对时为")}
"""Common letters that only the other Chinese has."""
CODES = re.compile(r"`[^`]+`|<[a-z_|]+>|\{\d\}|[A-Za-z0-9_.+/-]+")
DOCS = ROOT / "web" / "docs"


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def english(info):
    return locales.texts(locales.described(info))


def test_the_files_are_what_is_made_of_the_translations(info):
    made = locales.files(info)
    stale = [str(file) for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    assert not stale, "python dev.py nox -s locales"
    assert {file for file in locales.LOCALES.rglob("*") if file.is_file()} == set(made)


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_each_text_is_translated_with_its_codes_and_none_is_left_over(language, english):
    assert len(english) > 250
    assert locales.problems(language, english) == []


def test_a_missing_a_stale_and_a_broken_translation_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(locales, "TRANSLATIONS", tmp_path)
    (tmp_path / "zh.json").write_text(json.dumps({"gone": "x", "in {0}, `code`": "y"}), encoding="utf-8")
    found = locales.problems("zh", ["new", "in {0}, `code`"])
    assert found == [
        "no translation of 'new'",
        "the English text is gone: 'gone'",
        "`code` is missing in the translation of 'in {0}, `code`'",
        "{0} is missing in the translation of 'in {0}, `code`'",
    ]


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_each_sentence_is_in_the_script_of_its_language(language):
    for text, translated in locales.translations(language).items():
        if len(re.findall(r"[A-Za-z]+", CODES.sub("", text) or text)) and len(text.split()) > 4:
            foreign = re.findall(f"[{SCRIPTS[language]}]", translated)
            assert len(foreign) * 4 > len(text.split()), (text, translated)
        assert not set(translated) & OF_THE_OTHER.get(language, set()), translated


def test_comfyui_serves_them(server, info):
    served = server.get("/i18n")
    for language in locales.LANGUAGES:
        load = served[language]["nodeDefs"]["InternVLU_LoadModel"]
        assert load["display_name"] == locales.translations(language)["Load InternVL-U"] != "Load InternVL-U"
        greedy = served[language][locales.SECTION]["greedy"]
        assert greedy == locales.translations(language)["greedy"] != "greedy"


def test_the_page_finds_a_chinese_help_page_and_its_picture(server, info):
    _, pack = info["InternVLU_WriteThought"]["python_module"].split(".")
    base = f"{server.url}/extensions/{pack}/docs/"  # where the page looks for both, in every language
    with urllib.request.urlopen(f"{base}InternVLU_WriteThought/zh.md") as answer:
        text = answer.read().decode()
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    with urllib.request.urlopen(base + picture) as answer:
        assert answer.headers.get_content_type() == "image/jpeg"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_the_chinese_help_page_is_of_the_english_one(page):
    english, chinese = page.read_text(encoding="utf-8"), DOCS / page.stem / "zh.md"
    assert chinese.is_file(), f"translate {page.name}"
    text = chinese.read_text(encoding="utf-8")
    stamp = locales.page_stamp(english)
    assert text.endswith(f"{stamp}\n"), f"{page.name} has changed: change {chinese} too, then its last line: {stamp}"
    assert len(re.findall(f"[{HAN}]", text)) * 3 > len(re.findall(r"[a-z]+", english)) * 2
    rows = [sum(line.startswith("|") for line in one.splitlines()) for one in (english, text)]
    assert rows[0] == rows[1]
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", english):
        assert f"]({name})" in text and (DOCS / name).is_file()
    missing = {code for code in re.findall(r"`[^`\n]+`", english) if code not in text}
    assert not missing
