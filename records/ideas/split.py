# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
split.py: draw the halves of the list of ideas in README.md, and write its last column.

    python records/ideas/split.py            # write the column
    python records/ideas/split.py --check    # change nothing; fail if the column is another

Ideas of each kind are put into the order of a hash of SEED and their names, after those of TRIED, which had
been tried in a small race before; the first half of them is in the first half of the list.
"""

import argparse
import hashlib
import sys
from pathlib import Path

README = Path(__file__).resolve().parent / "README.md"
SEED = 29
TRIED = ["exclusive", "backout", "normuon", "logit-cap"]

def rows(text: str) -> list[list[str]]:
    """The cells of each row of the list, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[1] in ("winner", "neutral", "loser")]

def draw(kinds: dict[str, str], seed: int = SEED) -> dict[str, str]:
    """idea -> first or second, for ideas of these kinds."""
    def place(idea: str) -> tuple[bool, str]:
        return idea not in TRIED, hashlib.sha256(f"{seed} {idea}".encode()).hexdigest()

    halves = {}
    for kind in sorted(set(kinds.values())):
        ideas = sorted((idea for idea in kinds if kinds[idea] == kind), key=place)
        for number, idea in enumerate(ideas):
            halves[idea] = "first" if number < len(ideas) // 2 else "second"
    return halves

def fill_in(text: str) -> str:
    """README's text with the column."""
    halves = draw({row[0]: row[1] for row in rows(text)})
    lines = []
    for line in text.splitlines():
        idea = line.split("|")[1].strip() if line.startswith("| ") else ""
        if idea in halves:
            line = line.rstrip("| ").rpartition("|")[0] + f"| {halves[idea]} |"
        lines.append(line)
    return "\n".join(lines) + "\n"

def main(argv=None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the column is another")
    args = parser.parse_args(argv)
    before = README.read_text(encoding="utf-8")
    after = fill_in(before)
    if args.check:
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0

if __name__ == "__main__":
    sys.exit(main())
