"""
report.py: what the logs of runs say, and which of two versions is faster or has the lower loss.

    python records/report.py DIR_OR_LOGS...            # the runs, their means, whether they meet the target
    python records/report.py NEW... --vs OLD...        # and the differences, with 95 % confidence intervals
    python records/report.py RACE --step 100           # the same, with loss and time at step 100
    python records/report.py DIR --plot loss.png       # draw loss against steps and against training time
    python records/report.py --leaderboard [--check]   # write the tables in records/, or only check them

records/README.md says what a set of logs is and explains the figures.
"""

import argparse
import json
import math
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

try:
    from matplotlib.figure import Figure
    from scipy import stats
except ImportError as error:
    sys.exit(f"report.py: {error.name} is missing; run: python -m pip install -r records/requirements.txt")

RECORDS = Path(__file__).resolve().parent
TARGET = 3.28  # nats per token; of the published speedrun, whose logs have no settings
CLAIM = 0.01  # a claim that the mean loss meets the target needs a p-value below this
MAY_DIFFER = {"seed", "log_dir", "data_path", "nproc",  # settings in which the runs of a set may differ
              "checkpoint_every", "checkpoint_last", "checkpoint_keep"}
BEGIN, END = "<!-- from here: written by report.py --leaderboard -->", "<!-- to here -->"
COLUMNS = ["runs", "final loss", "p (mean ≤ target)", "reached", "time, s", "step, ms"]


class ReportError(Exception):
    """A user error: printed as one sentence, without a traceback."""


# ----------------------------------------------------------------------------------------------------
# Logs: source, environment, settings and the lines of the run, with a line of 100 "=" between them

STEP = re.compile(r"^step:(\d+)/(\d+)(?: val_loss:(\d+\.\d+))? train_time:(\d+)(?:\.\d+)?ms "
                  r"step_avg:(?:\d+\.\d+|nan)ms(?: train_loss:(\d+\.\d+))?$", re.MULTILINE)
SETTING = re.compile(r"^ *(\w+): (.*?)(?:  \(overridden\))?$", re.MULTILINE)


class Point(NamedTuple):
    """One step line: a validation, or a training step with val_loss None. Losses in nats per token."""

    step: int
    seconds: float  # training time so far
    val_loss: float | None
    train_loss: float | None  # None in published logs


@dataclass
class Run:
    """One complete log, up to the step at which it is judged."""

    path: Path
    source: str  # without the newlines at its end
    settings: dict[str, str]  # name -> repr of the value; empty in published logs
    points: list[Point]
    num_steps: int  # planned
    target: float | None  # nats per token; None if the run had none (TARGET_LOSS=0)
    peak: int  # MiB on the first GPU; 0 on a CPU
    hardware: str

    def __post_init__(self):
        self.step, self.seconds, self.loss, _ = self.points[-1]  # a validation
        self.step_avg = 1000 * self.seconds / max(self.step, 1)  # ms
        race, name = self.path.resolve().parent.parent, self.path.name
        self.round = (race, name) if name.startswith("round-") else None


def read_log(path: Path, step: int | None = None) -> Run:
    """Read one complete log; with `step`, up to the validation at that step.

    Raises OSError, and ReportError if the log is cut or damaged, or if its run was stopped or resumed.
    """
    try:
        return parse_log(path, path.read_text(encoding="utf-8"), step)
    except ValueError as error:  # also of an encoding that is not UTF-8
        raise ReportError(f"{path}: not the log of a complete run: {error}.") from None


def parse_log(path: Path, text: str, step: int | None) -> Run:
    source, *parts = re.split(r"^={100}\n", text, flags=re.MULTILINE)
    if len(parts) not in (2, 3):  # published logs have no settings
        raise ValueError("expected source, environment, settings and steps with lines of 100 '=' between "
                         f"them, found {len(parts)} such lines")
    environment, lines = parts[0], parts[-1]
    settings = dict(SETTING.findall(parts[1])) if len(parts) == 3 else {}
    peak = re.search(r"^peak memory allocated: (\d+) MiB", lines, re.MULTILINE)
    if not peak:
        raise ValueError("expected a last line on peak memory, found none")
    points, num_steps = [], 0
    for number, last, val_loss, ms, train_loss in STEP.findall(lines):
        losses = (float(text) if text else None for text in (val_loss, train_loss))
        points.append(Point(int(number), int(ms) / 1000, *losses))
        num_steps = int(last)
    trained = [point.step for point in points if point.val_loss is None]
    steps = list(range(1, len(trained) + 1))
    if not points or trained != steps or points[-1].val_loss is None or points[-1].step != len(trained):
        raise ValueError("expected all steps from 1 on, and a finite validation loss after the last")
    points = [point for point in points if step is None or point.step <= step]
    if points[-1].val_loss is None or step not in (None, points[-1].step):
        raise ValueError(f"expected a validation at step {step}, found none")
    target = float(settings.get("target_loss", TARGET)) or None
    return Run(path, source.rstrip("\n"), settings, points, num_steps, target, int(peak[1]),
               describe_hardware(environment, lines))


def describe_hardware(environment: str, lines: str) -> str:
    """'8 x NVIDIA H100 80GB HBM3', or '2 CPUs, 2 threads' for a run without a GPU."""
    gpus = re.findall(r"^\|\s+\d+\s+(NVIDIA .+?)\s{2,}", environment, re.MULTILINE)
    if not gpus or re.search(r"^device: cpu", lines, re.MULTILINE):
        cpus = re.search(r"\d+ CPUs, \d+ threads", environment)
        return cpus[0] if cpus else "unknown"
    ranks = re.search(r"^batch: (\d+) rank", lines, re.MULTILINE)
    return f"{ranks[1] if ranks else len(gpus)} x {' or '.join(sorted(set(gpus)))}"


# ----------------------------------------------------------------------------------------------------
# Sets of runs of one version


class Group(NamedTuple):
    """The runs of one version."""

    label: str
    runs: list[Run]

    def values(self, name: str) -> list[float]:
        """loss (nats per token), seconds or step_avg (ms) of each run."""
        return [getattr(run, name) for run in self.runs]

    def hardware(self) -> str:
        return "; ".join(sorted({run.hardware for run in self.runs}))


def load(paths, step: int | None = None) -> list[Group]:
    """The sets at these paths: one per version of a race's folder, else one of all the logs.

    Raises OSError, and ReportError if a log is not complete, or if those of a set are of different versions.
    """
    paths = [Path(path) for path in paths]
    if len(paths) == 1:  # a race
        labels = race_labels(paths[0]) or sorted({log.parent.name for log in paths[0].glob("*/*.txt")})
        folders = {paths[0] / label: sorted((paths[0] / label).glob("*.txt")) for label in labels}
        if any(folders.values()):
            return [load_group(folder, logs, step) for folder, logs in folders.items() if logs]
    logs = [log for path in paths for log in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    return [load_group(paths[0] if paths[0].is_dir() else paths[0].parent, logs, step)]


def load_group(folder: Path, logs: list[Path], step: int | None) -> Group:
    runs = [read_log(log, step) for log in logs]
    if not runs:
        raise ReportError(f"{folder}: expected logs (*.txt) of one version, found none.")
    for number, run in enumerate(runs):
        differ = differences(runs[0], run)
        if differ:
            raise ReportError(f"{runs[0].path} and {run.path} differ in {differ}: expected logs of one "
                              "version; put --vs between those of two.")
        if run.points in [other.points for other in runs[:number]]:
            raise ReportError(f"{run.path}: the same run as another log; name it once.")
    return Group(folder.resolve().name, runs)


def differences(one, other) -> str:
    """'mlp_dim (512, 384), source': in what two versions differ, which have `settings` and a `source`."""
    found = [f"{name} ({one.settings.get(name)}, {other.settings.get(name)})"
             for name in {**one.settings, **other.settings}
             if name not in MAY_DIFFER and one.settings.get(name) != other.settings.get(name)]
    return ", ".join(found + ["source"] * (one.source != other.source))


def race_labels(race: Path) -> list[str]:
    """Labels of the versions in a race's race.json; none without one. Raises ReportError if it is damaged."""
    path = race / "race.json"
    if not path.is_file():
        return []
    try:
        return [version["label"] for version in json.loads(path.read_text(encoding="utf-8"))["versions"]]
    except (ValueError, LookupError, TypeError):
        raise ReportError(f"{path}: damaged: expected the versions of a race.") from None


# ----------------------------------------------------------------------------------------------------
# Statistics


def interval(new: list[float], old: list[float], paired: bool) -> tuple[float, float]:
    """Mean of new - old, and half its 95 % confidence interval: of the pairs, or after Welch.

    Half is nan for too few runs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of equal values, whose interval has no width
        test = stats.ttest_rel(new, old) if paired else stats.ttest_ind(new, old, equal_var=False)
        low, high = test.confidence_interval(0.95)
    return fmean(new) - fmean(old), (high - low) / 2


def compare(new: Group, old: Group) -> str:
    """'paired over 5 rounds: faster by 1.42 ± 0.19 s (0.9914 ± 0.0011 of the time); loss lower by ...'

    Two versions of one race are compared round by round, others after Welch.
    """
    pairs = [(a, b) for a in new.runs for b in old.runs if a.round and a.round == b.round]
    if pairs:
        new, old = (Group("", runs) for runs in zip(*pairs))
    times = interval(new.values("seconds"), old.values("seconds"), bool(pairs))
    losses = interval(new.values("loss"), old.values("loss"), bool(pairs))
    # A difference of logarithms is the logarithm of a ratio. At step 0 no time has passed.
    logs = [[math.log(max(seconds, 1e-6)) for seconds in group.values("seconds")] for group in (new, old)]
    log_ratio, log_half = interval(*logs, bool(pairs))
    ratio = math.exp(log_ratio)
    way = f"paired over {len(pairs)} rounds" if pairs else "unpaired (a claim of speed needs a race)"
    return (f"{way}: {verdict(*times, 2, ' s', 'time', 'faster', 'slower')} "
            f"({plus_minus(ratio, ratio * math.sinh(log_half), 4)} of the time); "
            f"{verdict(*losses, 4, '', 'loss', 'loss lower', 'loss higher')}")


def verdict(value: float, half: float, digits: int, unit: str, what: str, below: str, above: str) -> str:
    """'faster by 1.42 ± 0.19 s', or that there is no clear difference."""
    if abs(value) > half:
        return f"{below if value < 0 else above} by {plus_minus(abs(value), half, digits)}{unit}"
    why = "too few runs to judge" if math.isnan(half) else "no clear difference in"
    return f"{why} {what}: {plus_minus(value, half, digits, '+')}{unit}"


def plus_minus(value: float, half: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def spread(values: list[float], digits: int) -> str:
    """'1.6711 ± 0.0106': mean and standard deviation."""
    return plus_minus(fmean(values), stdev(values) if len(values) > 1 else math.nan, digits)


def p_value(losses: list[float], target: float) -> float:
    """p of the one-sided t-test that the mean loss is below the target; nan without two different losses."""
    if len(set(losses)) < 2:
        return math.nan
    return stats.ttest_1samp(losses, target, alternative="less").pvalue


def reached(group: Group) -> str:
    """How many runs came to their target, and the step: '10 of 10, at step 90 to 100', '0 of 3'."""
    steps = []  # of the first validation at or below the target
    for run in group.runs:
        steps += [point.step for point in run.points if point.val_loss and point.val_loss <= run.target][:1]
    span = " to ".join(map(str, sorted({min(steps), max(steps)}))) if steps else ""
    return f"{len(steps)} of {len(group.runs)}" + (f", at step {span}" if steps else "")


# ----------------------------------------------------------------------------------------------------
# Output: text, curves, and the tables of the records


def cells(group: Group) -> list[str]:
    """The cells under COLUMNS; ± is the standard deviation over runs."""
    target, losses = group.runs[0].target, group.values("loss")
    p = p_value(losses, target) if target else math.nan
    return [str(len(losses)), spread(losses, 4), "-" if math.isnan(p) else f"{p:.2g} ({target:g})",
            reached(group) if target else "-",
            spread(group.values("seconds"), 2), spread(group.values("step_avg"), 1)]


def report(groups: list[Group]) -> None:
    """Print each set, whether it meets its target, and how it differs from the first."""
    for group in groups:
        print(f"{group.label}, {group.hardware()}")
        for run in group.runs:
            print(f"  {run.path.name}: seed {run.settings.get('seed', '-')}, loss {run.loss:.4f} at step "
                  f"{run.step}/{run.num_steps}, {run.seconds:.2f} s, {run.step_avg:.2f} ms per step, peak "
                  f"{run.peak} MiB")
        figures = zip(COLUMNS, cells(group))
        print(" ", "; ".join(f"{name}: {cell}" for name, cell in figures if cell != "-"))
        target = group.runs[0].target
        if target:
            met = "meets" if p_value(group.values("loss"), target) < CLAIM else "is not shown to meet"
            print(f"  the mean loss {met} the target {target:g} with p < {CLAIM}")
    for group in groups[1:]:
        print(f"\n{group.label} against {groups[0].label}, {compare(group, groups[0])}")
        if group.hardware() != groups[0].hardware():
            print("  their times do not compare: they ran on different hardware")
        if len({run.step for run in (*group.runs, *groups[0].runs)}) > 1:
            print("  the runs end at different steps: --step N compares losses at step N")


def draw(groups: list[Group], path: str) -> None:
    """Draw loss against steps and against training time: validations as points, training losses faint.

    The first tenth of the steps is left out, because its losses are so much higher.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, x, title in zip(axes, ("step", "seconds"), ("step", "training time, s")):
        for number, group in enumerate(groups):
            for run in group.runs:
                shown = [point for point in run.points if point.step >= 0.1 * run.num_steps]
                trained = [(getattr(point, x), point.train_loss) for point in shown if point.train_loss]
                validated = [(getattr(point, x), point.val_loss) for point in shown if point.val_loss]
                color, label = f"C{number % 10}", group.label if run is group.runs[0] else None
                if trained:
                    axis.plot(*zip(*trained), color=color, lw=0.7, alpha=0.15)
                axis.plot(*zip(*validated), "o-", color=color, lw=1, ms=3, label=label)
        for target in {group.runs[0].target for group in groups} - {None}:
            axis.axhline(target, color="black", ls="--", lw=1, label=f"target {target:g}")
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss, nats per token")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def leaderboard() -> dict[Path, str]:
    """README file -> its text with the table that the logs give. Raises ReportError for a wrong record."""
    board, pages = [["date", "what changed", "hardware", *COLUMNS]], {}
    for page in sorted(RECORDS.glob("????-??-??_*/README.md"), reverse=True):  # others are no records yet
        record, groups = page.parent, load([page.parent])
        rounds = [f"round-{n:02}.txt" for n in range(1, 1 + max(len(group.runs) for group in groups))]
        table = [["version", *COLUMNS, f"against {groups[0].label}"]]
        text = page.read_text(encoding="utf-8")
        title = text.partition("\n")[0].lstrip("# ") or record.name
        for group in groups:
            names = [run.path.name for run in group.runs]
            if group.runs[0].round and names != rounds:
                raise ReportError(f"{record}, {group.label}: expected {', '.join(rounds)}, found only "
                                  f"{', '.join(names)}.")
            link = f"[{title}]({record.name})" + f": {group.label}" * (len(groups) > 1)
            board.append([record.name[:10], link, group.hardware(), *cells(group)])
            against = "-" if group is groups[0] else compare(group, groups[0])
            table.append([group.label, *cells(group), against])
        if BEGIN in text:
            pages[page] = with_table(page, table)
    return pages | {RECORDS / "README.md": with_table(RECORDS / "README.md", board)}


def with_table(page: Path, rows: list[list[str]]) -> str:
    """The page's text with these rows as the table between its two markers."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ReportError(f"{page}: expected the lines {BEGIN!r} and {END!r} around the table.")
    return f"{before}{begin}\n{table}{end}{after}"


def main(argv=None) -> int:
    """Returns the exit code: 0, or 1 after one sentence on stderr; argparse exits with 2."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="DIR_OR_LOG")
    parser.add_argument("--vs", nargs="+", default=[], metavar="DIR_OR_LOG", help="the set to compare with")
    parser.add_argument("--step", type=int, help="take loss and time at this step (default: the last)")
    parser.add_argument("--target", type=float, help="target loss in nats per token (default: the logs' own)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves")
    parser.add_argument("--leaderboard", action="store_true", help="write the tables of the records")
    parser.add_argument("--check", action="store_true", help="with --leaderboard: only check the tables")
    args = parser.parse_args(argv)
    if bool(args.logs) == args.leaderboard:
        parser.error("expected either logs and folders of logs, or --leaderboard")
    try:
        if args.leaderboard:
            for page, text in leaderboard().items():
                if args.check and page.read_text(encoding="utf-8") != text:
                    raise ReportError(f"{page}: its table is not what the logs give; run: python "
                                      "records/report.py --leaderboard")
                page.write_text(text, encoding="utf-8")
            return 0
        groups = [*(load(args.vs, args.step) if args.vs else []), *load(args.logs, args.step)]
        for run in (run for group in groups for run in group.runs):
            run.target = args.target or run.target
        report(groups)
        if args.plot:
            draw(groups, args.plot)
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
