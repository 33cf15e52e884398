# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
ideas.py: the list of ideas in README.md: the versions of a race of them, and its halves.

    python records/ideas/ideas.py first | xargs python records/race.py -n 2 --name First
    python records/ideas/ideas.py --draw     # write the column that says which half an idea is in

The halves: ideas of each kind are put into the order of a hash of SEED and their names, after those of TRIED,
which had been tried in a small race before; the first half of them is in the first half of the list.
"""

import argparse
import hashlib
import re
import shlex
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
README = FOLDER / "README.md"
BASE = "a9228118e63f221d693ed0b2ee4a50d94558ce9a"  # the commit of the script to which the patches belong
SEED = 29
TRIED = ["exclusive", "backout", "normuon", "logit-cap"]

def read_rows(text: str) -> list[list[str]]:
    """The cells of each row of the list, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[1] in ("winner", "neutral", "loser")]

def patches_of(row: list[str]) -> list[Path]:
    return [FOLDER / name for name in re.findall(r"\]\((\S+\.patch)\)", row[6])]

def settings_of(row: list[str]) -> list[str]:
    """NAME=VALUE of each setting of an idea."""
    return " ".join(re.findall(r"`(.*?)`", row[6])).split()

def in_base(row: list[str]) -> bool:
    """Whether the base has the idea already, so that the version is the base without it."""
    return "(without)" in row[6]

def version(row: list[str]) -> str:
    """An idea as race.py takes it."""
    script = "+".join([BASE, *map(str, patches_of(row))])
    return f"{row[0]}:{shlex.join([script, *settings_of(row)])}"

def draw(kinds: dict[str, str]) -> dict[str, str]:
    """idea -> first or second. kinds: idea -> winner, neutral or loser."""
    def place(idea: str) -> tuple[bool, str]:
        return idea not in TRIED, hashlib.sha256(f"{SEED} {idea}".encode()).hexdigest()

    halves = {}
    for kind in set(kinds.values()):
        ideas = sorted((idea for idea in kinds if kinds[idea] == kind), key=place)
        for number, idea in enumerate(ideas):
            halves[idea] = "first" if number < len(ideas) // 2 else "second"
    return halves

def fill_in(text: str) -> str:
    """README's text with the column that is drawn."""
    halves = draw({row[0]: row[1] for row in read_rows(text)})
    lines = []
    for line in text.splitlines():
        idea = line.split("|")[1].strip() if line.startswith("| ") else ""
        if idea in halves:
            line = line.removesuffix("|").rpartition("|")[0] + f"| {halves[idea]} |"
        lines.append(line)
    return "\n".join(lines) + "\n"

def main(argv=None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("half", nargs="?", choices=["first", "second", "both"], default="both",
                        help="print the versions of this half, after the base (default: both)")
    parser.add_argument("--draw", action="store_true", help="draw the halves and write them into README.md")
    args = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    if args.draw:
        README.write_text(fill_in(text), encoding="utf-8")
        return 0
    print(shlex.quote(f"base:{BASE}"))
    for row in read_rows(text):
        if args.half in ("both", row[-1]):
            print(shlex.quote(version(row)))
    return 0

if __name__ == "__main__":
    sys.exit(main())
