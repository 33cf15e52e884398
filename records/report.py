"""
report.py: what the logs of runs say, and which of two versions is faster or has the lower loss.

    python records/report.py DIR_OR_LOGS...            # the runs, their means, whether they meet the target
    python records/report.py NEW... --vs OLD...        # and the differences, with 95 % confidence intervals
    python records/report.py RACE --step 100           # the same, with loss and time at step 100
    python records/report.py DIR --plot loss.png       # draw loss against steps and against training time
    python records/report.py --leaderboard [--check]   # write the tables in records/, or only check them

A set is the logs of one version: logs that are named one by one, or a folder of logs. A race's folder, as
race.py makes it, has one folder of logs per version; each version is a set and is compared with the first.
Logs of the published speedrun are read as well. README.md explains the figures.
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


class ReportError(Exception):
    """A user error: printed as one sentence, without a traceback."""


# ----------------------------------------------------------------------------------------------------
# Logs: source, environment, settings and the lines of the run, with a line of 100 "=" between them

STEP = re.compile(r"^step:(\d+)/(\d+)(?: val_loss:(\d+\.\d+))? train_time:(\d+)(?:\.\d+)?ms "
                  r"step_avg:(?:\d+\.\d+|nan)ms(?: train_loss:(\d+\.\d+))?$", re.MULTILINE)
SETTING = re.compile(r"^ *(\w+): (.*?)(?:  \(overridden\))?$", re.MULTILINE)
PEAK = re.compile(r"^peak memory allocated: (\d+) MiB", re.MULTILINE)
PARTIAL = re.compile(r"^(?:resumed|stopped by|ended by)\b.*", re.MULTILINE)


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
    step: int  # of the last point, a validation; so are loss and seconds
    loss: float  # nats per token
    seconds: float  # training time
    step_avg: float  # ms per step
    target: float | None  # nats per token; None if the run had none (TARGET_LOSS=0)
    peak: int  # MiB on the first GPU; 0 on a CPU
    hardware: str

    def target_step(self, target: float | None) -> int | None:
        """The step of the first validation at or below the target; None if there is none."""
        return next((p.step for p in self.points if target and p.val_loss and p.val_loss <= target), None)


def read_log(path: Path, step: int | None = None) -> Run:
    """Read one complete log; with `step`, up to the validation at that step.

    Raises ReportError with its path if it is missing, cut, damaged or part of a run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    source, *parts = re.split(r"^={100}\n", text, flags=re.MULTILINE)
    if len(parts) not in (2, 3):
        raise ReportError(f"{path}: not a whole log: expected source, environment, settings and steps with "
                          f"lines of 100 '=' between them, found {len(parts)} such lines.")
    environment, lines = parts[0], parts[-1]
    settings = dict(SETTING.findall(parts[1])) if len(parts) == 3 else {}
    peak, partial = PEAK.search(lines), PARTIAL.search(lines)
    if partial or not peak:
        wrong = f"part of a run: {partial[0]}" if partial else "cut: it has no last line on peak memory."
        raise ReportError(f"{path}: {wrong}")
    points, num_steps = read_steps(path, lines)
    target = float(settings.get("target_loss", TARGET)) or None
    if points[-1].step < num_steps and (target is None or points[-1].val_loss > target):
        raise ReportError(f"{path}: cut: it ends at step {points[-1].step} of {num_steps} above its target.")
    points = [point for point in points if step is None or point.step <= step]
    last = points[-1]
    if last.val_loss is None or step not in (None, last.step):
        raise ReportError(f"{path}: expected a validation at step {step}, found none.")
    return Run(path, source.rstrip("\n"), settings, points, num_steps, last.step, last.val_loss, last.seconds,
               1000 * last.seconds / max(last.step, 1), target, int(peak[1]),
               describe_hardware(environment, lines))


def read_steps(path: Path, lines: str) -> tuple[list[Point], int]:
    """The step lines and the planned number of steps. Raises ReportError if any is damaged or missing."""
    matches, points = STEP.findall(lines), []
    for step, _, val_loss, ms, train_loss in matches:
        val_loss, train_loss = (float(text) if text else None for text in (val_loss, train_loss))
        points.append(Point(int(step), int(ms) / 1000, val_loss, train_loss))
    if not points or len(points) != len(re.findall(r"^step:", lines, re.MULTILINE)):
        raise ReportError(f"{path}: damaged: expected whole step lines with finite losses.")
    trained = [point.step for point in points if point.val_loss is None]
    seconds = [point.seconds for point in points]
    in_order = trained == list(range(1, len(trained) + 1)) and seconds == sorted(seconds)
    if not in_order or points[-1].val_loss is None or points[-1].step != len(trained):
        raise ReportError(f"{path}: damaged: expected all steps in order and a validation at the end.")
    return points, int(matches[0][1])


def describe_hardware(environment: str, lines: str) -> str:
    """'8 x NVIDIA H100 80GB HBM3', or '2 CPUs, 2 threads' for a run without a GPU."""
    listed = re.search(r"^GPUs of this node: (.+)", environment, re.MULTILINE)
    gpus = (listed[1].split(", ") if listed else
            re.findall(r"^\|\s+\d+\s+(NVIDIA .+?)\s{2,}", environment, re.MULTILINE))
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


def load(paths, step: int | None = None, strict: bool = False) -> list[Group]:
    """The sets at these paths: one per version of a race's folder, else one of all the logs.

    Logs that cannot be read are named on stderr and left out. Raises ReportError if no other is there, or if
    `strict`; and if the logs of a set differ in source or settings.
    """
    paths = [Path(path) for path in paths]
    versions = version_folders(paths[0]) if len(paths) == 1 else []
    if versions:
        return [load_group(folder, sorted(folder.glob("*.txt")), step, strict) for folder in versions]
    logs = [log for path in paths for log in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    return [load_group(paths[0] if paths[0].is_dir() else paths[0].parent, logs, step, strict)]


def load_group(folder: Path, logs: list[Path], step: int | None, strict: bool) -> Group:
    group = Group(folder.resolve().name, [])
    for log in logs:
        try:
            run = read_log(log, step)
        except ReportError as error:
            if strict:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        check_same_version(group.runs, run)
        group.runs.append(run)
    if not group.runs:
        raise ReportError(f"{folder}: expected complete logs (*.txt) of one version, found none.")
    return group


def race_labels(race: Path) -> list[str]:
    """Labels of the versions in a race's race.json; none without one. Raises ReportError if it is damaged."""
    path = race / "race.json"
    try:
        return [version["label"] for version in json.loads(path.read_text(encoding="utf-8"))["versions"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, KeyError, TypeError):
        raise ReportError(f"{path}: damaged: expected the versions of a race.") from None


def version_folders(race: Path) -> list[Path]:
    """Folders with logs in a race's folder, in the order of its race.json."""
    order = race_labels(race)
    folders = sorted({log.parent for log in race.glob("*/*.txt")})
    return sorted(folders, key=lambda path: order.index(path.name) if path.name in order else len(order))


def check_same_version(runs: list[Run], run: Run) -> None:
    """Raises ReportError if `run` is of another version than `runs`, or is one of them."""
    for other in runs:
        differ = [f"{name} ({other.settings.get(name)}, {run.settings.get(name)})"
                  for name in {**other.settings, **run.settings}
                  if other.settings.get(name) != run.settings.get(name) and name not in MAY_DIFFER]
        differ += ["source"] * (other.source != run.source)
        if differ:
            raise ReportError(f"{other.path} and {run.path} differ in {', '.join(differ)}: expected logs of "
                              "one version; put --vs between those of two.")
        if other.points == run.points:
            raise ReportError(f"{other.path} and {run.path} are the same run; name it once.")


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


def compare(new: Group, old: Group) -> tuple[int, str]:
    """The number of rounds by which two sets are paired (0 if they are not of one race), and what differs.

    'faster by 1.42 ± 0.19 s (0.9914 ± 0.0011 of the time); loss higher by 0.0562 ± 0.0086'
    """
    new_runs, old_runs = ({run.path.name: run for run in group.runs} for group in (new, old))
    rounds = sorted(name for name in new_runs.keys() & old_runs.keys() if name.startswith("round-"))
    if len({run.path.resolve().parent.parent for run in (*new.runs, *old.runs)}) > 1:
        rounds = []  # of different races
    if rounds:
        new, old = (Group("", [runs[name] for name in rounds]) for runs in (new_runs, old_runs))
    times = interval(new.values("seconds"), old.values("seconds"), bool(rounds))
    losses = interval(new.values("loss"), old.values("loss"), bool(rounds))
    # a difference of logarithms is the logarithm of a ratio
    log_new, log_old = ([math.log(max(x, 1e-6)) for x in group.values("seconds")] for group in (new, old))
    log_ratio, log_half = interval(log_new, log_old, bool(rounds))
    ratio = math.exp(log_ratio)
    return len(rounds), (f"{clause(*times, 2, ' s', 'time', 'faster', 'slower')} "
                         f"({plus_minus(ratio, ratio * math.sinh(log_half), 4)} of the time); "
                         f"{clause(*losses, 4, '', 'loss', 'loss lower', 'loss higher')}")


def clause(value: float, half: float, digits: int, unit: str, what: str, below: str, above: str) -> str:
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
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def p_text(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def reached(group: Group, target: float) -> str:
    """How many runs came to the target: '10 of 10, at step 90 to 100', '0 of 3'."""
    steps = sorted(step for run in group.runs if (step := run.target_step(target)) is not None)
    span = f", at step {' to '.join(map(str, sorted({steps[0], steps[-1]})))}" if steps else ""
    return f"{len(steps)} of {len(group.runs)}{span}"


# ----------------------------------------------------------------------------------------------------
# Output: text, curves, and the tables of the records

COLUMNS = ["runs", "final loss", "p (mean ≤ target)", "reached", "time, s", "step, ms"]


def cells(group: Group) -> list[str]:
    """The cells under COLUMNS; ± is the standard deviation over runs."""
    target, losses = group.runs[0].target, group.values("loss")
    return [str(len(losses)), spread(losses, 4),
            f"{p_text(p_value(losses, target))} ({target:g})" if target else "-",
            reached(group, target) if target else "-",
            spread(group.values("seconds"), 2), spread(group.values("step_avg"), 1)]


def describe(group: Group, target: float | None) -> str:
    """A set's runs, their means, and whether they meet the target (default: the logs' own)."""
    lines = [f"{group.label}, {group.hardware()}"]
    for run in group.runs:
        lines.append(f"  {run.path.name}: seed {run.settings.get('seed', '-')}, loss {run.loss:.4f} at step "
                     f"{run.step}/{run.num_steps}, {run.seconds:.2f} s, {run.step_avg:.2f} ms per step, "
                     f"peak {run.peak} MiB")
    lines.append(f"{len(group.runs)} runs, mean ± standard deviation: "
                 f"loss {spread(group.values('loss'), 4)}, time {spread(group.values('seconds'), 2)} s, "
                 f"step {spread(group.values('step_avg'), 2)} ms")
    target = target or group.runs[0].target
    if target:
        p = p_value(group.values("loss"), target)
        met = "meets" if p < CLAIM else "is not shown to meet"
        lines.append(f"target {target:g}: reached by {reached(group, target)}; the mean loss {met} it: "
                     f"p {p_text(p)}, and a claim needs p < {CLAIM}")
    return "\n".join(lines)


def describe_difference(new: Group, old: Group) -> str:
    rounds, sentence = compare(new, old)
    way = f"paired over {rounds} rounds" if rounds else "unpaired (a claim of speed needs a race)"
    lines = [f"{new.label} against {old.label}, {way}: {sentence}"]
    if new.hardware() != old.hardware():
        lines.append(f"  their times do not compare: {new.hardware()} against {old.hardware()}")
    if len({run.step for run in (*new.runs, *old.runs)}) > 1:
        lines.append("  the runs end at different steps: --step N compares losses at step N")
    return "\n".join(lines)


def report(groups: list[Group], target: float | None = None) -> None:
    """Print each set, and how each differs from the first."""
    blocks = [describe(group, target) for group in groups]
    print("\n\n".join(blocks + [describe_difference(group, groups[0]) for group in groups[1:]]))


def draw(groups: list[Group], path: str) -> None:
    """Draw loss against steps and against training time, from a tenth of the steps on.

    Validations are points, training losses are faint.
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


def leaderboard(folder: Path) -> dict[Path, str]:
    """README file -> its text with the table that the logs give. Raises ReportError for a wrong record."""
    rows, pages = [["date", "what changed", "hardware", *COLUMNS]], {}
    for record in sorted(folder.glob("????-??-??_*"), reverse=True):
        page, groups = record / "README.md", load_record(record)
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        title = re.search(r"^What: (.+)", text, re.MULTILINE) or re.search(r"^# (.+)", text, re.MULTILINE)
        if not title:
            raise ReportError(f"{page}: expected a heading or a line 'What: ...', found none.")
        own = [["version", *COLUMNS, f"against {groups[0].label}"]]
        for group in groups:
            link = f"[{title[1]}]({record.name})" + (f": {group.label}" if len(groups) > 1 else "")
            against = "-" if group is groups[0] else compare(group, groups[0])[1]
            rows.append([record.name[:10], link, group.hardware(), *cells(group)])
            own.append([group.label, *cells(group), against])
        if BEGIN in text:
            pages[page] = with_table(page, own)
    return pages | {folder / "README.md": with_table(folder / "README.md", rows)}


def load_record(record: Path) -> list[Group]:
    """The sets of a record. Raises ReportError if a log is not complete, or a round of a race is missing."""
    groups = load([record], strict=True)
    rounds = {run.path.name for group in groups for run in group.runs if run.path.name.startswith("round-")}
    rounds |= {f"round-{number:02}.txt" for number in range(1, len(rounds) + 1)}
    for group in groups:
        missing = rounds - {run.path.name for run in group.runs}
        if missing:
            log = group.runs[0].path.parent / min(missing)
            raise ReportError(f"{log}: missing: expected every round of a race in its record.")
    return groups


def with_table(page: Path, rows: list[list[str]]) -> str:
    """The page's text with these rows as the table between its two markers."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(["---"] * len(rows[0])) + " |")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ReportError(f"{page}: expected the lines {BEGIN!r} and {END!r} around the table.")
    return "\n".join([before + begin, *lines, end + after])


def update_tables(folder: Path, check: bool) -> None:
    """Write the tables; with `check`, raise ReportError for one that is not what its logs give."""
    for page, text in leaderboard(folder).items():
        if check and page.read_text(encoding="utf-8") != text:
            raise ReportError(f"{page}: its table is not what the logs give; run: python records/report.py "
                              "--leaderboard")
        page.write_text(text, encoding="utf-8")


def parse_arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="DIR_OR_LOG")
    parser.add_argument("--vs", nargs="+", metavar="DIR_OR_LOG", help="the set to compare with")
    parser.add_argument("--step", type=int, help="take loss and time at this step (default: the last)")
    parser.add_argument("--target", type=float, help="target loss in nats per token (default: the logs' own)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves")
    parser.add_argument("--leaderboard", nargs="?", const=RECORDS, type=Path, metavar="FOLDER",
                        help="write the tables of the records in this folder (default: records/)")
    parser.add_argument("--check", action="store_true", help="with --leaderboard: only check the tables")
    args = parser.parse_args(argv)
    if bool(args.logs) == bool(args.leaderboard) or (args.check and not args.leaderboard):
        parser.error("expected logs or folders of logs, or --leaderboard with or without --check")
    return args


def main(argv=None) -> int:
    """Returns the exit code: 0, or 1 after one sentence on stderr; argparse exits with 2."""
    args = parse_arguments(argv)
    try:
        if args.leaderboard:
            update_tables(args.leaderboard, args.check)
            return 0
        groups = load(args.logs, args.step)
        if args.vs:
            old = load(args.vs, args.step)
            if len(old) > 1:
                raise ReportError(f"report.py: --vs: expected one set, found {len(old)}; name one of them.")
            groups = old + groups
        report(groups, args.target)
        if args.plot:
            draw(groups, args.plot)
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
