"""Make `locales/`, from which ComfyUI takes the nodes' texts in the language of its user, out of the translations.

    python dev.py nox -s locales

tools/translations/LANGUAGE.json holds each English text with its translation. The English ones are those of the nodes'
schemas, as a running ComfyUI tells them in /object_info, and those of web/js, which are the arguments of `text`. What
the frontend shows by itself (names, tooltips, descriptions) goes into locales/LANGUAGE/nodeDefs.json; what our own
scripts show (their messages, the choices of lists) into main.json, under "internvlu". A text without a translation is
named, and so is a translation whose English text is gone: nothing goes out of date unseen.

The session runs `python -m tools.locales --comfyui FOLDER`, with .venv's Python; `--languages zh` makes one language
alone, `--missing` prints what wants a translation. The help pages, web/docs/NODE/zh.md, are written by hand: the last
line of each holds `page_stamp` of the English page that it says the same as.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCALES, TRANSLATIONS, SCRIPTS = ROOT / "locales", ROOT / "tools" / "translations", ROOT / "web" / "js"
ENGLISH = "en"
LANGUAGES = ("zh", "zh-TW", "ja", "ko")
OURS = "InternVLU_"
SECTION = "internvlu"
"""The key in main.json that web/js/text.js reads."""
LIMIT = "max_new_tokens"
"""An input that a message names."""
LISTING_WIDGETS = {"model_name", "mllm_name", "vae_name", "lora_name", "device"}
"""Widgets whose choices are files, or what the machine has."""
_CALL = re.compile(r"""(?<![\w.])text\(\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|`((?:[^`\\$]|\\.)*)`)""")
_SPECIAL = re.compile(r"[{}@|$]")
Nodes = dict[str, dict]
Translate = Callable[[str], str]


def described(info: dict) -> Nodes:
    """Returns the English texts of our nodes, in the form of nodeDefs.json but for "choices", from /object_info."""
    return {name: _node(one) for name, one in sorted(info.items()) if name.startswith(OURS)}


def _node(node: dict) -> dict:
    inputs = {}
    for group in ("required", "optional"):
        for name, (kind, *rest) in node["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            choices = options.get("options") or (kind if isinstance(kind, list) else [])
            inputs[name] = {
                "name": options.get("display_name") or name,
                "tooltip": options.get("tooltip") or "",
                "placeholder": options.get("placeholder") or "",
                "choices": [] if name in LISTING_WIDGETS else [str(one) for one in choices],
            }
    outputs = {
        str(number): {"name": name, "tooltip": tooltip or ""}
        for number, (name, tooltip) in enumerate(
            zip(node["output_name"], node.get("output_tooltips") or [""] * len(node["output_name"]), strict=True)
        )
    }
    texts = {"display_name": node["display_name"], "description": node["description"]}
    return texts | {"inputs": inputs, "outputs": outputs}


def messages() -> list[str]:
    """Returns the English texts of our scripts: what `text("...")` is called with."""
    found = []
    for file in sorted(SCRIPTS.glob("*.js")):
        for match in _CALL.finditer(file.read_text(encoding="utf-8")):
            found.append(re.sub(r"\\(.)", r"\1", next(one for one in match.groups() if one is not None)))
    return list(dict.fromkeys(found))


def texts(nodes: Nodes) -> list[str]:
    """Returns every English text once, in the order of the nodes."""
    found: list[str] = []
    for node in nodes.values():
        found += [node["display_name"], node["description"]]
        for one in node["inputs"].values():
            found += [one["name"], one["tooltip"], one["placeholder"], *one["choices"]]
        for one in node["outputs"].values():
            found += [one["name"], one["tooltip"]]
    return [text for text in dict.fromkeys([*found, *messages()]) if re.search(r"[A-Za-z]", text)]


def translations(language: str) -> dict[str, str]:
    """Returns the translations into a language by their English text."""
    file = TRANSLATIONS / f"{language}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def problems(language: str, english: Iterable[str]) -> list[str]:
    """Returns what is wrong with the translations into a language, in sentences."""
    known, wanted = translations(language), set(english)
    found = [f"no translation of {text!r}" for text in english if not known.get(text, "").strip()]
    found += [f"the English text is gone: {text!r}" for text in known if text not in wanted]
    for text, translated in known.items():
        for code in sorted(set(re.findall(r"`[^`]+`|<[a-z_]+>|\{\d\}", text)) - set(_codes(translated))):
            found.append(f"{code} is missing in the translation of {text!r}")
    return found


def _codes(text: str) -> list[str]:
    return re.findall(r"`[^`]+`|<[a-z_]+>|\{\d\}", text)


def node_definitions(nodes: Nodes, translate: Translate) -> Nodes:
    """Returns nodeDefs.json."""

    def fields(one: dict, keys: Iterable[str]) -> dict:
        return {key: escaped(translate(one[key])) for key in keys if one[key]}

    return {
        name: {
            **fields(node, ("display_name", "description")),
            "inputs": {key: fields(one, ("name", "tooltip")) for key, one in node["inputs"].items()},
            "outputs": {key: fields(one, ("name", "tooltip")) for key, one in node["outputs"].items()},
        }
        for name, node in nodes.items()
    }


def own_texts(nodes: Nodes, translate: Translate) -> dict[str, str]:
    """Returns the texts that our scripts show: their messages, labels, placeholders and the choices of lists."""
    found = messages()
    for node in nodes.values():
        for name, one in node["inputs"].items():
            label = (
                [one["name"]] if one["name"] != name or name == LIMIT else []
            )  # web/js/nodes.js, ofPython in text.js
            found += [*label, *one["choices"], *filter(None, [one["placeholder"]])]
    return {text: translate(text) for text in dict.fromkeys(found) if re.search(r"[A-Za-z]", text)}


def escaped(text: str) -> str:
    """Returns a text in which vue-i18n's own characters stand for themselves."""
    return _SPECIAL.sub(lambda found: "{'" + found[0] + "'}", text)


def files(info: dict, languages: Iterable[str] = LANGUAGES) -> dict[Path, str]:
    """Returns the contents of the files of `locales/` for English and some languages."""
    nodes = described(info)
    made = {}
    for language in (ENGLISH, *languages):
        known = translations(language)
        folder = LOCALES / language
        made[folder / "nodeDefs.json"] = _json(node_definitions(nodes, lambda text, known=known: known.get(text, text)))
        if language != ENGLISH:
            own = own_texts(nodes, lambda text, known=known: known.get(text, text))
            made[folder / "main.json"] = _json({SECTION: own})
    return made


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def page_stamp(english: str) -> str:
    """Returns the last line of a translated help page: which text of the English one it is of."""
    return f"<!-- of {hashlib.sha256(english.encode()).hexdigest()[:16]} -->"


def main() -> None:
    from .demo import server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES, help="only these; else all")
    parser.add_argument("--missing", action="store_true", help="print the texts that want a translation, as JSON, only")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        server(args.comfyui, Path(folder), python=sys.executable) as comfyui,
    ):
        info = comfyui.get("/object_info")
    english = texts(described(info))
    if args.missing:
        known = {language: translations(language) for language in args.languages}
        missing = [text for text in english if any(text not in one for one in known.values())]
        print(json.dumps(missing, ensure_ascii=False, indent=1))
        return
    found = [f"{language}: {problem}" for language in args.languages for problem in problems(language, english)]
    for file, content in files(info, args.languages).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    for problem in found:
        print(problem)
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
