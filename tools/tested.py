"""Makes the README's table of tested versions out of docs/tested.json, which `nox -s ... -- --record` adds to.

python -m tools.tested
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "tested.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- tested versions: tools/tested.py -->\n", "<!-- end -->\n"
COLUMNS = ("ComfyUI", "Python", "torch", "transformers", "huggingface_hub", "numpy", "Pillow", "processor", "date")
KEY = COLUMNS[:7]


def add(record: Path) -> None:
    """Adds the record of a run in which all tests passed, in place of an earlier one of the same versions."""
    new = json.loads(record.read_text(encoding="utf-8"))
    if new["failed"] or not new["passed"]:
        raise ValueError(f"{new['failed']} tests failed and {new['passed']} passed: only a green run is recorded")
    records = [one for one in read() if any(one[key] != new[key] for key in KEY)] + [new]
    records.sort(key=lambda one: [numbers(one[key]) for key in KEY])
    FILE.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


def read() -> list[dict]:
    """Returns the records, oldest versions first."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else []


def numbers(version: str) -> list[int]:
    """Returns a version as numbers, so that 0.33 comes after 0.4; no version comes first."""
    return [int(part) for part in version.split("+")[0].split(".") if part.isdigit()]


def table() -> str:
    """Returns the records as a table in Markdown, empty without any."""
    if not read():
        return ""
    rows = [(*COLUMNS, "passed"), ("---",) * (len(COLUMNS) + 1)]
    rows += [(*(one[column] for column in COLUMNS), str(one["passed"])) for one in read()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(text: str) -> str:
    """Returns the README's text with the table of today's records."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
