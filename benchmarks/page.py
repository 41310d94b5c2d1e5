"""Writes the measured results into docs/performance.md: a table between each `<!-- name -->` and `<!-- /name -->`.

Above each table stand its plot, the command that makes it anew, the processor and the date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .plots import PICTURES, PLOTS, ROOT
from .report import make_parser

PAGE = ROOT / "docs" / "performance.md"
PLACES = {"--comfyui": "PATH", "--official": "../InternVL-U", "--work": "FOLDER"}
"""What stands in a command in place of the folders of the machine that it ran on."""
LEFT_OUT, SPREAD = ("from", "to"), ("ms a token", "picture s", "ms each")
_BLOCK = "(<!-- {0} -->\n).*?(<!-- /{0} -->)"


def write(page: Path, results: Path) -> list[str]:
    """Puts each result of a folder into its place on the page; returns the names that have none there."""
    text = page.read_text(encoding="utf-8")
    homeless = []
    for file in sorted(results.glob("*.json")):
        block = re.compile(_BLOCK.format(re.escape(file.stem)), re.DOTALL)
        shown = _picture(page, file.stem) + to_markdown(json.loads(file.read_text(encoding="utf-8")))
        text, count = block.subn(lambda found, shown=shown: f"{found[1]}{shown}{found[2]}", text)
        if not count:
            homeless.append(file.stem)
    page.write_text(text, encoding="utf-8")
    return homeless


def _picture(page: Path, name: str) -> str:
    """Returns the plot of a table, if there is one beside the page."""
    place = f"{PICTURES.name}/{name}.svg"
    return f"\n![{PLOTS[name].title}]({place})\n" if name in PLOTS and (page.parent / place).is_file() else ""


def to_markdown(result: Mapping) -> str:
    """Returns a result as a table with its command and machine."""
    machine, versions, settings = result["machine"], result["versions"], result.get("settings", {})
    packages = ("torch", "transformers", "diffusers")
    said = [f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores", result["date"]]
    said += [f"{name} {versions[name]}" for name in packages if versions.get(name)]
    others = {"ComfyUI": "comfyui", "xllamacpp": "xllamacpp"}
    said += [f"{name} {settings[key]}" for name, key in others.items() if settings.get(key)]
    said += [f"threads: {settings['threads']}"] if settings.get("threads") else []
    if settings.get("GB/s"):
        said.append(f"limits from {settings['GB/s']:.0f} GB/s and {settings['TFLOP/s']:.2g} TFLOP/s")
    return f"\n`{shown_command(result['command'])}`\n({'; '.join(said)})\n\n{table(result['results'])}\n\n"


def shown_command(command: str) -> str:
    """Returns a command line without the machine's own folders, and without where its results went."""
    words = re.sub(r" --(json|arithmetic) \S+", "", command).split(" ")
    for option, place in PLACES.items():
        if option in words:
            words[words.index(option) + 1] = place
    return " ".join("FOLDER" if word.startswith("/") else word for word in words)


def table(rows: Sequence[Mapping]) -> str:
    """Returns rows as a table in Markdown. A spread is shown with the number that it belongs to."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in LEFT_OUT]
    lines = [keys, ["---"] * len(keys)]
    lines += [[_cell(row, key) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Mapping, key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, float):
        return str(value)
    spread = f" ({_number(row['from'])} to {_number(row['to'])})" if key in SPREAD and "from" in row else ""
    return _number(value) + spread


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def main() -> None:
    parser = make_parser(__doc__, measures=False)
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="what was measured")
    parser.add_argument("--page", type=Path, default=PAGE, help="what it is written into")
    arguments = parser.parse_args()
    for name in write(arguments.page, arguments.results):
        print(f"{name} has no place on {arguments.page}")


if __name__ == "__main__":
    main()
