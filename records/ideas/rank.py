# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
rank.py: does a small race rank the ideas of README.md as the big one does?

    python records/ideas/rank.py RACE [--half second] [--plot ranks.png] [--one-percent 0.004]

RACE/base and RACE/IDEA hold logs of runs. An idea's difference is the mean, over its seeds, of its final loss
less that of the base with the same seed. The gain at full size is README.md's, in per cent of the steps. An
idea that the base has already is raced without it, and its difference is turned round. --one-percent: what
1 % of the steps is worth in the small race, in nats.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from ideas import README, in_base, read_rows
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import ReportError, read_log  # noqa: E402


class Idea(NamedTuple):
    name: str
    kind: str  # winner, neutral or loser, at full size
    half: str
    gain: float  # [per cent of the steps] at full size
    differences: list[float]  # [nats] of each seed; below 0: better than the base

    @property
    def mean(self) -> float:
        return fmean(self.differences)

    @property
    def right(self) -> bool:
        """Whether the small race gives the sign of the big one."""
        return (self.mean < 0) == (self.gain > 0)


def losses(folder: Path) -> dict[str, float]:
    """seed -> final loss of the runs in a folder. Raises ReportError if it has none."""
    runs = [read_log(path) for path in sorted(folder.glob("*.txt"))]
    if not runs:
        raise ReportError(f"{folder}: expected logs (*.txt), found none.")
    return {run.settings["seed"]: run.end.loss for run in runs}


def read_ideas(race: Path, half: str, base: dict[str, float]) -> list[Idea]:
    """The ideas of this half that have logs, in README's order. base: its losses. Raises OSError and
    ReportError."""
    found = []
    for row in read_rows(README.read_text(encoding="utf-8")):
        name, kind, gain = row[:3]
        if half not in ("both", row[-1]) or not (race / name).is_dir():
            continue
        sign = -1 if in_base(row) else 1
        of_idea = losses(race / name)
        if missing := of_idea.keys() - base.keys():
            raise ReportError(f"{race / 'base'}: expected a run with seed {min(missing)}, as {name} has, "
                              "found none.")
        differences = [sign * (loss - base[seed]) for seed, loss in of_idea.items()]
        found.append(Idea(name, kind, row[-1], float(gain), differences))
    if not found:
        raise ReportError(f"{race}: expected logs of ideas of this half, found none.")
    return found


def half_interval(differences: list[float], deviation: float) -> float:
    """Half of the 95 % interval of their mean, if every idea's differences have this standard deviation."""
    return 1.96 * deviation / len(differences) ** 0.5


def pooled_deviation(ideas: list[Idea], base: list[float]) -> float:
    """The standard deviation of an idea's differences over seeds, pooled; if each has one seed, that of the
    difference of two runs of the base; nan if there is only one of these, too."""
    several = [idea.differences for idea in ideas if len(idea.differences) > 1]
    if not several:
        return 2**0.5 * np.std(base, ddof=1) if len(base) > 1 else np.nan
    variances = [np.var(differences, ddof=1) for differences in several]
    return np.sqrt(np.average(variances, weights=[len(differences) - 1 for differences in several]))


def report(ideas: list[Idea], deviation: float, one_percent: float) -> None:
    """Print a table, and how far the two races agree."""
    print("| idea | kind | gain at full size, % | difference here, nats | runs | sign |")
    print("| --- | --- | --- | --- | --- | --- |")
    for idea in sorted(ideas, key=lambda idea: -idea.gain):
        sign = "-"
        if idea.kind != "neutral":
            sign = "right" if idea.right else "wrong"
        figures = f"{idea.gain:g} | {idea.mean:+.4f} | {len(idea.differences)}"
        print(f"| {idea.name} | {idea.kind} | {figures} | {sign} |")
    gains = [idea.gain for idea in ideas]
    rank = stats.spearmanr(gains, [-idea.mean for idea in ideas], alternative="greater")
    print(f"\nrank correlation {rank.statistic:.3f} of {len(ideas)} ideas, one-sided p = {rank.pvalue:.2g}")
    for kind in ("winner", "loser"):
        signs = [idea.right for idea in ideas if idea.kind == kind]
        print(f"signs right among {kind}s: {sum(signs)} of {len(signs)}")
    print(f"standard deviation of a difference over seeds: {deviation:.4f} nats")
    if one_percent:
        rounds = (1.96 * deviation / (0.5 * one_percent)) ** 2
        print(f"0.5 % of the steps is {0.5 * one_percent:.4f} nats: an interval so wide takes "
              f"{np.ceil(rounds):.0f} rounds")


def draw(ideas: list[Idea], deviation: float, path: Path) -> None:
    """The gain at full size against the difference here, with its 95 % interval."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for idea in ideas:
        place = idea.gain, -idea.mean
        half = np.nan_to_num(half_interval(idea.differences, deviation))
        color = dict(winner="C2", neutral="C7", loser="C3")[idea.kind]
        axis.errorbar(*place, yerr=half, fmt="o", color=color, ms=4)
        axis.annotate(idea.name, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axis.axhline(0, color="black", lw=0.8)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xscale("symlog", linthresh=2)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_xlabel("gain at full size, % of the steps (published)")
    axis.set_ylabel("loss lower in the small race, nats")
    figure.savefig(path, dpi=130)


def main(argv=None) -> int:
    """Returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("race", type=Path, metavar="RACE")
    parser.add_argument("--half", choices=["first", "second", "both"], default="both")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--one-percent", type=float, default=0, metavar="NATS")
    args = parser.parse_args(argv)
    try:
        base = losses(args.race / "base")
        ideas = read_ideas(args.race, args.half, base)
        deviation = pooled_deviation(ideas, list(base.values()))
    except (OSError, ReportError) as error:
        print(error, file=sys.stderr)
        return 1
    report(ideas, deviation, args.one_percent)
    if args.plot:
        draw(ideas, deviation, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
