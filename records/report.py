"""
report.py: what logs say: runs, their statistics, and whether one version beats another.

    python records/report.py DIR_OR_LOGS...                          # a table of runs and their statistics
    python records/report.py NEW... --vs OLD...                      # and the difference, with a verdict
    python records/report.py DIR... --plot loss.png --csv loss.csv   # the curves
    python records/report.py --leaderboard [--check]                 # the tables in records/ (or are they?)

It reads logs of this train_gpt.py and of the published speedrun. Logs named one by one, and folders with
logs, are one group; a folder with folders of logs, as race.py makes it, is a group a folder. README.md says
how to read the figures. Parsing needs the standard library; statistics and plots need requirements.txt.
"""

import argparse
import csv
import hashlib
import importlib
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

RECORDS = Path(__file__).resolve().parent
TARGET = 3.28  # nats a token, where a log names no target: the published speedrun's
MARGIN = 0.005  # nats a token: a loss whose interval ends below this difference is "no worse"
NOT_COUNTED = {"seed", "log_dir", "data_path", "nproc",  # settings in which the runs of a group may differ
               "checkpoint_every", "checkpoint_last", "checkpoint_keep"}  # written while the clock stands
BEGIN, END = "<!-- from here: written by report.py --leaderboard -->", "<!-- to here -->"


class ReportError(Exception):
    """Something that the person who asked can put right, in one sentence."""


def need(module: str):
    """Import an optional module. Raises ReportError, with the remedy, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ReportError(f"report.py: needs {module.split('.')[0]}; run: python -m pip install -r "
                          f"{RECORDS.name}/requirements.txt") from None


# ----------------------------------------------------------------------------------------------------
# Logs: source, a line of 100 "=", environment, "=", (settings, "=",) and the lines of the run

RULE = "=" * 100
STEP = re.compile(r"step:(\d+)/(\d+)(?: val_loss:(\d+\.\d+))? train_time:(\d+(?:\.\d+)?)ms "
                  r"step_avg:(\d+\.\d+|nan)ms(?: train_loss:(\d+\.\d+))?")
PEAK = re.compile(r"peak memory allocated: (\d+) MiB reserved: (\d+) MiB")
SETTING = re.compile(r"(\w+): (.*?)(  \(overridden\))?")


class Point(NamedTuple):
    """A line of the run: a training step (with its loss in our logs), or a validation after it."""

    step: int
    ms: float  # training time so far
    val_loss: float | None
    train_loss: float | None


@dataclass
class Run:
    """One complete log."""

    path: Path
    source: str  # "" where the log holds none
    settings: dict[str, str] = field(default_factory=dict)  # as printed; empty in published logs
    overridden: set[str] = field(default_factory=set)
    points: list[Point] = field(default_factory=list)
    num_steps: int = 0  # planned
    step_avg: float = 0.0  # ms
    peak: int = 0  # MiB, of the first rank's GPU; 0 on a CPU
    target: float | None = TARGET  # None where the log's is 0, which no run reaches
    hardware: str = ""
    sha256: str = ""  # of the whole log

    @property
    def last(self) -> Point:
        return self.validations[-1]

    @property
    def validations(self) -> list[Point]:
        return [p for p in self.points if p.val_loss is not None]

    @property
    def seconds(self) -> float:
        return self.last.ms / 1000

    @property
    def round(self) -> int | None:
        """Its round in a race.py race, else None."""
        number = re.fullmatch(r"round-(\d+)\.txt", self.path.name)
        return int(number[1]) if number and (self.path.parent.parent / "race.json").is_file() else None

    @property
    def version(self) -> tuple:
        """What must be the same in all runs of a group."""
        return self.source, {k: v for k, v in self.settings.items() if k not in NOT_COUNTED}

    def reached(self, target: float | None) -> Point | None:
        """The first validation at or below the target."""
        return next((p for p in self.validations if target is not None and p.val_loss <= target), None)


def read_log(path) -> Run:
    """Parse a log. Raises ReportError that names the file and says: missing, cut, damaged, or no log."""
    path = Path(path)

    def bad(what: str):
        return ReportError(f"{path}: {what}")

    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise bad("missing") from None
    except OSError as error:
        raise bad(f"unreadable: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise bad(f"damaged: byte {error.start} is not UTF-8") from None
    if "\0" in text:
        raise bad(f"damaged: byte {text.index(chr(0))} is zero")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    rules = [i for i, line in enumerate(lines) if line == RULE]
    start = rules[-1] + 1 if rules else 0
    if not rules and not any(map(STEP.fullmatch, lines)):
        raise bad("no log of a run: it has no step lines")
    for line in lines[start:]:
        if line.startswith(("resumed: ", "stopped by ", "ended by ")):
            raise bad(f"part of a run: {line}")
    peaks = [m for m in map(PEAK.fullmatch, lines[start:]) if m]
    if not peaks:
        steps = [m[1] for m in map(STEP.fullmatch, lines[start:]) if m]
        raise bad(f"cut: it ends {'at step ' + steps[-1] if steps else 'before step 0'}, "
                  "without the final line on memory")
    run = Run(path, "\n".join(lines[:rules[0]]) if rules else "", peak=int(peaks[0][1]),
              sha256=hashlib.sha256(data).hexdigest())
    final = None
    for number, line in enumerate(lines[start:], start + 1):
        if line.startswith("step:"):
            m = STEP.fullmatch(line)
            if m is None:
                raise bad(f"damaged: line {number} is no whole step line: {line[:60]!r}")
            val, train = (float(m[i]) if m[i] else None for i in (3, 6))
            problem = out_of_order(run, Point(int(m[1]), float(m[4]), val, train), int(m[2]))
            if problem:
                raise bad(f"damaged: line {number}: {problem}")
            if val is not None:
                run.step_avg = float(m[5])
        elif line.startswith("target_reached:"):
            final = dict(pair.partition(":")[::2] for pair in line.split())
    if len(rules) > 2:
        run.settings, run.overridden = read_settings(lines[rules[-2] + 1:rules[-1]], bad)
    if len(peaks) > 1 or not run.validations or run.last.step != run.points[-1].step:
        raise bad("damaged: the lines of one run with a validation at its end are not there")
    check_end(run, final, bad)
    run.hardware = describe_hardware(lines[rules[0] + 1:] if rules else lines)
    return run


def out_of_order(run: Run, point: Point, num_steps: int) -> str | None:
    """Append a point to the run, or say why it cannot follow those before it."""
    run.num_steps = run.num_steps or num_steps
    before = run.points[-1] if run.points else None
    trained = [p.step for p in run.points[-2:] if p.val_loss is None]
    if num_steps != run.num_steps or point.step > num_steps:
        return f"step {point.step} of {num_steps} in a run of {run.num_steps} steps"
    if before is not None and (point.ms < before.ms or point.step < before.step):
        return f"step {point.step} at {point.ms:.0f} ms follows step {before.step} at {before.ms:.0f} ms"
    if trained and point.step != trained[-1] + (point.val_loss is None):
        return f"step {point.step} follows step {trained[-1]}"
    run.points.append(point)
    return None


def read_settings(lines: list[str], bad) -> tuple[dict[str, str], set[str]]:
    matches = [SETTING.fullmatch(line) for line in lines]
    if None in matches:
        raise bad(f"damaged: no setting, but {lines[matches.index(None)][:60]!r}, among the settings")
    return {m[1]: m[2] for m in matches}, {m[1] for m in matches if m[3]}


def check_end(run: Run, final: dict | None, bad) -> None:
    """Compare the run with what its settings and its last line say, and note its target."""
    planned, every = (int(run.settings.get(name, "0")) for name in ("num_iterations", "val_loss_every"))
    if planned and planned != run.num_steps:
        raise bad(f"damaged: its settings say {planned} steps, its lines {run.num_steps}")
    validated = {p.step for p in run.validations}
    skipped = [step for step in range(0, run.last.step, every) if step not in validated] if every else []
    if skipped:
        raise bad(f"damaged: the validation at step {skipped[0]} is not there")
    if final is None and (run.settings or run.last.step != run.num_steps):
        raise bad(f"cut: it ends at step {run.last.step} of {run.num_steps} without a final line")
    if final is None:
        return
    steps = max(run.last.step, 1)
    if abs(run.step_avg - run.last.ms / steps) > 0.006 + 0.5 / steps:  # both are rounded
        raise bad(f"damaged: {run.last.ms:.0f} ms for {steps} steps do not make an average of "
                  f"{run.step_avg:.2f} ms")
    try:
        same = (float(final["val_loss"]) == run.last.val_loss and int(final["final_step"]) == run.last.step
                and final["train_time"] == f"{run.last.ms:.0f}ms"
                and final["step_avg"] == f"{run.step_avg:.2f}ms"
                and float(final["target_loss"]) == float(run.settings.get("target_loss", "nan"))
                and (run.last.val_loss <= float(final["target_loss"])) == (final["target_reached"] == "1"))
    except (KeyError, ValueError):
        same = False
    if not same:
        raise bad("damaged: its final line does not fit its settings and its last validation")
    run.target = float(final["target_loss"]) or None


def describe_hardware(lines: list[str]) -> str:
    """What the environment lines say of GPUs, or of CPUs and threads where the run used none."""
    found = dict(line.partition(": ")[::2] for line in lines if ": " in line)
    gpus = [name for name in found.get("GPUs of this node", "").split(", ") if name]
    gpus = gpus or [m[1] for m in (re.match(r"\|\s+\d+\s+(NVIDIA .+?)\s{2,}", line) for line in lines) if m]
    if found.get("device", "").startswith("cpu") or not gpus:
        cpus = re.search(r"(\d+ CPUs, \d+ threads)", found.get("platform", ""))
        return cpus[1] if cpus else "unknown"
    ranks = re.match(r"(\d+) rank", found.get("batch", ""))  # of several nodes, the log names one's GPUs
    return f"{max(int(ranks[1]) if ranks else len(gpus), 1)} x {' or '.join(sorted(set(gpus)))}"


# ----------------------------------------------------------------------------------------------------
# Groups: the runs of one version


@dataclass
class Group:
    """Runs that are to be of one version, and why other logs are left out."""

    label: str
    runs: list[Run]
    left_out: list[str] = field(default_factory=list)

    def numbers(self, name: str) -> list[float]:
        """loss (nats), seconds or step_avg (ms) of every run."""
        return [run.last.val_loss if name == "loss" else getattr(run, name) for run in self.runs]


def load(paths, mixed: bool = False) -> list[Group]:
    """Groups with the readable logs at these paths (files and folders), in order.

    Logs that are missing, cut or damaged are in `left_out`, a sentence each. Raises ReportError where a group
    has runs of different source or settings, unless `mixed`.
    """
    files: dict[str, list[Path]] = {}
    missing = []
    paths = [Path(p) for p in paths]
    for path in paths:
        if not path.is_dir():
            files.setdefault(path.parent.name or "logs", []).append(path)
            continue
        own, folders = sorted(path.glob("*.txt")), race_folders(path)
        if own:
            files.setdefault(path.resolve().name, []).extend(own)
        for folder, logs in folders.items():
            files.setdefault(folder, []).extend(logs)
        if not own and not folders:
            missing.append(f"{path}: no logs in this folder")
    if not any(map(race_folders, filter(Path.is_dir, paths))) and files:  # one group, whatever the folders
        files = {next(iter(files)): [path for some in files.values() for path in some]}
    groups = []
    for label, logs in files.items():
        group = Group(label, [])
        for log in logs:
            try:
                group.runs.append(read_log(log))
            except ReportError as error:
                group.left_out.append(str(error))
        groups.append(group)
        refuse_twins(group)
        if not mixed:
            refuse_mixture(group)
    if missing and not groups:
        groups.append(Group("logs", []))
    if missing:
        groups[0].left_out += missing
    return groups


def race_folders(path: Path) -> dict[str, list[Path]]:
    """label -> logs of each folder in `path`: of a race in its order, with the rounds that are missing."""
    found = {f.name: sorted(f.glob("*.txt")) for f in sorted(path.iterdir()) if f.is_dir()}
    found = {name: logs for name, logs in found.items() if logs}
    try:
        race = json.loads((path / "race.json").read_text(encoding="utf-8"))
        labels = [version["label"] for version in race["versions"]]
    except (OSError, ValueError, KeyError, TypeError):
        return found
    rounds = sorted({log.name for label in labels for log in found.get(label, ())})
    if not rounds:
        return found
    numbers = [int(m[1]) for m in (re.fullmatch(r"round-(\d+)\.txt", name) for name in rounds) if m]
    rounds = sorted({*rounds, *(f"round-{n:02}.txt" for n in range(1, max(numbers, default=0) + 1))})
    return {label: [path / label / name for name in rounds] for label in labels} | {
        name: logs for name, logs in found.items() if name not in labels}


def refuse_twins(group: Group) -> None:
    """No run counts twice."""
    seen = {}
    for run in group.runs:
        twin = seen.setdefault(run.sha256, run)
        if twin is not run:
            raise ReportError(f"report.py: {twin.path} and {run.path} are the same run: name it once.")


def check_race(path: Path, groups: list[Group]) -> None:
    """Hold a race's logs against its race.json. Raises ReportError where a log or a version is another."""
    race = json.loads((path / "race.json").read_text(encoding="utf-8"))
    versions = {version["label"]: version for version in race["versions"]}
    for group in groups:
        version = versions.get(group.label)
        for run in group.runs:
            if version is None:
                raise ReportError(f"{run.path}: {path / 'race.json'} knows no version {group.label}.")
            source = version.get("sha256") in (None, hashlib.sha256(run.source.encode()).hexdigest())
            names = [name for name, value in version.get("settings", {}).items()
                     if name not in NOT_COUNTED and run.settings.get(name) != value]
            if names or not source:
                raise ReportError(f"{run.path}: not the version that {path / 'race.json'} says: other "
                                  + (", ".join(names) or "source") + ".")


def refuse_mixture(group: Group) -> None:
    for run in group.runs[1:]:
        first = group.runs[0]
        (source, settings), (other_source, other) = first.version, run.version
        names = [name for name in {**settings, **other} if settings.get(name) != other.get(name)]
        what = ["source"] * (source != other_source) + [
            f"{name} ({settings.get(name, 'none')}, {other.get(name, 'none')})" for name in names]
        if what:
            raise ReportError(f"report.py: {first.path} and {run.path} differ in {', '.join(what)}: name one "
                              "version's logs, or give --mixed to take them together.")


# ----------------------------------------------------------------------------------------------------
# Statistics


def mean(values) -> float:
    return math.fsum(values) / len(values)


def sd(values) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(math.fsum((x - center) ** 2 for x in values) / (len(values) - 1))


def spread(values) -> bool:
    """Whether a t-test has something to go by: two values or more, not all the same (but for rounding)."""
    return len(values) > 1 and max(values) - min(values) > 1e-9 * max(map(abs, values))


def p_at_most(values, target: float | None) -> float | None:
    """p of the one-sided t-test: small means that the mean is below the target. None without spread."""
    if target is None or not spread(values):
        return None
    return float(need("scipy.stats").ttest_1samp(values, target, alternative="less").pvalue)


class Difference(NamedTuple):
    """new - old: the mean, and half its 95 % confidence interval (None where nothing gives one)."""

    mean: float
    half: float | None
    pairs: int  # rounds in which both ran; 0: unpaired, after Welch
    exact: bool = False  # the same in every pair, or no spread in either group


def difference(new, old, paired: bool) -> Difference:
    """Mean of new - old with its 95 % t-interval; paired, the two lists belong together value by value."""
    if paired:
        apart = [a - b for a, b in zip(new, old, strict=True)]
        scale = 1e-9 * max(map(abs, [*new, *old]))
        exact = len(apart) > 1 and max(apart) - min(apart) <= scale
        if exact or len(apart) < 2:
            return Difference(0.0 if abs(apart[0]) <= scale else mean(apart), None, len(apart), exact)
        return Difference(mean(apart), t_factor(len(apart) - 1) * sd(apart) / len(apart) ** 0.5, len(apart))
    delta = mean(new) - mean(old)
    if min(len(new), len(old)) < 2:
        return Difference(delta, None, 0)
    if not spread(new) and not spread(old):
        return Difference(delta, None, 0, True)
    a, b = sd(new) ** 2 / len(new), sd(old) ** 2 / len(old)
    freedom = (a + b) ** 2 / (a**2 / (len(new) - 1) + b**2 / (len(old) - 1))  # Welch, Satterthwaite
    return Difference(delta, t_factor(freedom) * (a + b) ** 0.5, 0)


def t_factor(freedom: float) -> float:
    return float(need("scipy.stats").t.ppf(0.975, freedom))


def compare(new: Group, old: Group) -> dict[str, Difference]:
    """Differences in loss, seconds, step_avg: by round where both groups are of one race, else unpaired."""
    rounds = [{r.round: i for i, r in enumerate(g.runs) if r.round is not None} for g in (new, old)]
    race = {r.path.resolve().parent.parent for g in (new, old) for r in g.runs}
    paired = all(len(x) == len(g.runs) for x, g in zip(rounds, (new, old))) and len(race) == 1
    both = sorted(rounds[0].keys() & rounds[1].keys()) if paired else []
    result = {}
    for name in ("loss", "seconds", "step_avg"):
        a, b = new.numbers(name), old.numbers(name)
        if both:
            a, b = [a[rounds[0][r]] for r in both], [b[rounds[1][r]] for r in both]
        result[name] = difference(a, b, bool(both))
    return result


def direction(d: Difference, below: str, above: str) -> str | None:
    """The word that the interval bears, or None where it contains zero."""
    if d.half is None and not d.exact:
        return None
    half = d.half or 0.0
    return below if d.mean + half < 0 else above if d.mean - half > 0 else None


def clause(d: Difference, what: str, below: str, above: str, digits: int, unit: str = "") -> str:
    """One half of a verdict: 'faster by 1.41 ± 0.09 s'. In it, ± is half the 95 % confidence interval."""
    word = direction(d, below, above)
    size = f"{abs(d.mean):.{digits}f}{unit}"
    if d.half is None:
        if not d.exact:
            return f"too few runs to judge {what} ({d.mean:+.{digits}f}{unit})"
        why = "with no spread in the runs"
        return f"{what} the same, {why}" if word is None else f"{word} by {size}, {why}"
    if word:
        return f"{word} by {abs(d.mean):.{digits}f} ± {d.half:.{digits}f}{unit}"
    return f"no difference in {what} seen ({d.mean:+.{digits}f} ± {d.half:.{digits}f}{unit})"


def verdict(differences: dict[str, Difference], margin: float) -> str:
    """A sentence on time and loss. `margin` (nats): 'no worse' where the interval ends at or below it."""
    loss = differences["loss"]
    text = clause(loss, "loss", "loss better", "loss worse", 4)
    if loss.half is not None and direction(loss, "<", ">") is None and loss.mean + loss.half <= margin:
        text = f"loss no worse ({loss.mean:+.4f} ± {loss.half:.4f})"
    return f"{clause(differences['seconds'], 'time', 'faster', 'slower', 2, ' s')}; {text}"


# ----------------------------------------------------------------------------------------------------
# Output: tables, curves, the leaderboard


def spelled(values, digits: int) -> str:
    """'1.6711 ± 0.0106': mean and standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {sd(values):.{digits}f}" if len(values) > 1 else "")


def spelled_p(p: float | None) -> str:
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def target_of(group: Group, target: float | None) -> float | None:
    """The target asked for, else the logs' (the lowest, where they are mixed)."""
    named = [run.target for run in group.runs if run.target is not None]
    return target if target is not None else min(named, default=None)


def reached_steps(group: Group, target: float) -> str:
    """'10 of 10, at step 90 to 100', '0 of 3'."""
    steps = [p.step for p in (run.reached(target) for run in group.runs) if p]
    span = " to ".join(map(str, sorted({min(steps), max(steps)}))) if steps else ""
    return f"{len(steps)} of {len(group.runs)}" + (f", at step {span}" if steps else "")


def hardware_of(group: Group) -> str:
    return "; ".join(sorted({run.hardware for run in group.runs}))


def table(rows: list[list[str]]) -> list[str]:
    """Rows of text as aligned columns, the first one to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows]


def describe(group: Group, target: float | None) -> list[str]:
    """A group's runs and statistics, as lines for a terminal."""
    left_out = [f"left out: {what}" for what in group.left_out]
    if not group.runs:
        return [f"{group.label}: no complete log", *left_out]
    first, target = group.runs[0], target_of(group, target)
    changed = sorted(first.overridden - NOT_COUNTED)
    source = hashlib.sha256(first.source.encode()).hexdigest()[:8] if first.source else "not in the log"
    overrides = [f"{name}={first.settings[name]}" for name in changed]
    title = [group.label, f"source {source}", hardware_of(group), *overrides]
    rows = [["run", "seed", "loss", "step", "time s", "step avg ms", "peak MiB"]]
    for run in group.runs:
        rows.append([run.path.name, run.settings.get("seed", "-"), f"{run.last.val_loss:.4f}",
                     f"{run.last.step}/{run.num_steps}", f"{run.seconds:.2f}", f"{run.step_avg:.2f}",
                     str(run.peak)])
    losses = group.numbers("loss")
    lines = [", ".join(title), *("  " + row for row in table(rows)), *left_out,
             f"n {len(losses)}; loss {spelled(losses, 4)}; time {spelled(group.numbers('seconds'), 2)} s; "
             f"step average {spelled(group.numbers('step_avg'), 2)} ms; "
             f"peak {max(run.peak for run in group.runs)} MiB"]
    if target is not None:
        p = p_at_most(losses, target)
        why = "" if p is not None else " (it takes two runs with different losses)"
        lines.append(f"target {target:g}: reached by {reached_steps(group, target)}; "
                     f"p that the mean loss is at most {target:g}: {spelled_p(p)}{why}")
    return lines


def describe_difference(new: Group, old: Group, margin: float, target: float | None) -> list[str]:
    """What distinguishes two groups, as lines for a terminal, the verdict last."""
    if not new.runs or not old.runs:
        return [f"{new.label} against {old.label}: no complete logs to compare"]
    found, lines = compare(new, old), []
    pairs = found["loss"].pairs
    way = f"paired over {pairs} round{'s' * (pairs > 1)}" if pairs else "unpaired (Welch)"
    lines.append(f"{new.label} against {old.label}, {way}; ± is half the 95 % confidence interval")
    rows = []
    for name, title, digits, unit in (("seconds", "time", 2, " s"), ("step_avg", "step average", 2, " ms"),
                                      ("loss", "loss", 4, "")):
        d, base = found[name], mean(old.numbers(name))
        half = "" if d.half is None else f" ± {d.half:.{digits}f}"
        share = f" ({d.mean / base:+.1%})" if base else ""
        rows.append(f"  {title}: {d.mean:+.{digits}f}{half}{unit}{share}")
    lines += rows
    goal = target_of(old, target)
    if goal is not None:
        lines.append(f"  target {goal:g}: reached by {reached_steps(new, goal)}, against "
                     f"{reached_steps(old, goal)}")
    places = {hardware_of(new), hardware_of(old)}
    if len(places) > 1:
        lines.append(f"  their times do not compare: {hardware_of(new)} against {hardware_of(old)}")
    if len({run.last.step for g in (new, old) for run in g.runs}) > 1:
        lines.append("  the runs ended at different steps: their losses are those of different steps")
    return [*lines, f"  verdict: {verdict(found, margin)}"]


def write_csv(groups: list[Group], path: str) -> None:
    """Every step line of every run; time in ms, losses in nats a token."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["group", "log", "seed", "step", "train_time_ms", "train_loss", "val_loss"])
        for group, run in ((group, run) for group in groups for run in group.runs):
            who = [group.label, run.path.name, run.settings.get("seed", "")]
            out.writerows([*who, p.step, f"{p.ms:.0f}", p.train_loss, p.val_loss] for p in run.points)


def draw(groups: list[Group], path: str, target: float | None) -> None:
    """Loss against step and against time: validations as points, training losses faint, a colour a group."""
    need("matplotlib").use("Agg")
    plt = need("matplotlib.pyplot")
    groups = [group for group in groups if group.runs]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, constrained_layout=True)
    colors = plt.get_cmap("tab10" if len(groups) <= 10 else "tab20").colors
    for number, group in enumerate(groups):
        color = colors[number % len(colors)]
        for run in group.runs:
            for axis, x in zip(axes, (lambda p: p.step, lambda p: p.ms / 1000)):
                trained = [p for p in run.points if p.train_loss is not None]
                axis.plot([x(p) for p in trained], [p.train_loss for p in trained], color=color, alpha=0.12,
                          lw=0.7)
                axis.plot([x(p) for p in run.validations], [p.val_loss for p in run.validations], "o-", ms=3,
                          lw=1, alpha=0.7, color=color, label=group.label if run is group.runs[0] else None)
    goals = [target] if target is not None else sorted({target_of(group, None) for group in groups} - {None})
    for axis, what in zip(axes, ("step", "training time, s")):
        for goal in goals:
            axis.axhline(goal, color="black", ls="--", lw=1, label=f"target {goal:g}")
        axis.set_xlabel(what)
        axis.grid(alpha=0.25)
    # without the fall of the first steps; where hardly anything was validated, training losses count too
    shown = [p.val_loss or p.train_loss for group in groups for run in group.runs for p in run.points
             if p.step >= 0.08 * run.num_steps and (p.val_loss or p.train_loss and len(run.validations) < 4)]
    shown += goals
    room = 0.05 * (max(shown) - min(shown)) or 0.1
    axes[0].set_ylim(min(shown) - room, max(shown) + room)
    axes[0].set_ylabel("loss, nats a token")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def leaderboard(folder: Path, margin: float) -> dict[Path, str]:
    """README -> its text with the table that the logs give: the leaderboard, and the records' own tables.

    Raises ReportError where a record has no README, its logs do not read, or a marker is missing.
    """
    rows, pages = [], {}
    records = [f for f in folder.iterdir() if re.match(r"\d{4}-\d\d-\d\d_", f.name)]
    for record in sorted(records, reverse=True):
        page = record / "README.md"
        if not page.is_file():
            raise ReportError(f"{record}: expected a README.md with a heading, found none.")
        text = page.read_text(encoding="utf-8")
        what = re.search(r"^What: (.+)$", text, re.MULTILINE) or re.search(r"^# (.+)$", text, re.MULTILINE)
        groups = load([record])
        bad = [x for group in groups for x in group.left_out]
        if bad or not any(group.runs for group in groups) or not what:
            raise ReportError(bad[0] if bad else f"{record}: expected logs and a README with a heading.")
        if (record / "race.json").is_file():
            check_race(record, groups)
        if BEGIN in text:
            pages[page] = between_markers(page, text, record_table(groups, margin))
        for group in groups:
            label = f": {group.label}" if len(groups) > 1 else ""
            link = f"[{what[1]}]({record.name})"
            rows.append([record.name[:10], link + label, hardware_of(group), *figures(group)])
    heads = ["date", "what changed", "hardware", *FIGURES]
    page = folder / "README.md"
    if not page.is_file():
        raise ReportError(f"{page}: missing.")
    pages[page] = between_markers(page, page.read_text(encoding="utf-8"), markdown([heads, *rows]))
    return pages


FIGURES = ["runs", "final loss", "p (mean ≤ target)", "reached", "time, s", "step, ms"]


def figures(group: Group) -> list[str]:
    """The cells under FIGURES: ± is the standard deviation over runs."""
    target, losses = target_of(group, None), group.numbers("loss")
    p = "-" if target is None else f"{spelled_p(p_at_most(losses, target))} ({target:g})"
    return [str(len(losses)), spelled(losses, 4), p, "-" if target is None else reached_steps(group, target),
            spelled(group.numbers("seconds"), 2), spelled(group.numbers("step_avg"), 1)]


def record_table(groups: list[Group], margin: float) -> list[str]:
    """A record's own table: each group, and against the first one."""
    rows = [["version", *FIGURES, f"against {groups[0].label}"]]
    for group in groups:
        against = verdict(compare(group, groups[0]), margin) if group is not groups[0] else "-"
        rows.append([group.label, *figures(group), against])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]]


def between_markers(page: Path, text: str, lines: list[str]) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"{page}: expected the lines {BEGIN!r} and {END!r} around the table.")
    return "\n".join([before + BEGIN, *lines, END + after])


def update_tables(folder: Path, margin: float, check: bool) -> None:
    """Write every table that logs in `folder` give; or only check, and raise ReportError for a stale one."""
    pages = leaderboard(folder, margin)
    stale = [page for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    if check and stale:
        raise ReportError(f"{stale[0]}: its table is not what the logs give; run: python records/report.py "
                          "--leaderboard")
    for page in stale:
        page.write_text(pages[page], encoding="utf-8")
    print(f"{len(pages)} tables are what the logs give" if check else
          f"{len(pages)} tables, {len(stale)} of them new: {', '.join(map(str, stale)) or 'none'}")


def report(groups: list[Group], base: Group | None, margin: float, target: float | None) -> None:
    """Print every group, and its difference from `base`."""
    shown = [base] * (base is not None and base not in groups) + groups
    blocks = [describe(group, target) for group in shown]
    blocks += [describe_difference(group, base, margin, target) for group in groups
               if base is not None and group is not base]
    print("\n\n".join("\n".join(block) for block in blocks))


def parse_arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What logs say: runs, statistics, and who beats whom.")
    parser.add_argument("logs", nargs="*", metavar="DIR_OR_LOG")
    parser.add_argument("--vs", nargs="+", metavar="DIR_OR_LOG", help="what to compare them with (one group)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw loss against step and time")
    parser.add_argument("--csv", metavar="FILE", help="write the curves")
    parser.add_argument("--target", type=float, help="loss in nats, instead of the logs' own target")
    parser.add_argument("--margin", type=float, default=MARGIN, help="nats that 'no worse' allows (0.005)")
    parser.add_argument("--mixed", action="store_true", help="take logs of different versions together")
    parser.add_argument("--leaderboard", nargs="?", const=RECORDS, type=Path, metavar="FOLDER",
                        help="write the tables of the records in this folder (default: records/)")
    parser.add_argument("--check", action="store_true", help="with --leaderboard: only check the tables")
    args = parser.parse_args(argv)
    if bool(args.logs) == bool(args.leaderboard) or (args.check and not args.leaderboard):
        parser.error("expected logs or folders of logs, or --leaderboard with or without --check")
    return args


def main(argv=None) -> int:
    """Returns the exit code: 0, or 1 with one sentence on stderr (argparse: 2)."""
    args = parse_arguments(argv)
    try:
        if args.leaderboard:
            update_tables(args.leaderboard, args.margin, args.check)
            return 0
        groups = load(args.logs, args.mixed)
        base = groups[0] if len(groups) > 1 else None
        if args.vs:
            others = load(args.vs, args.mixed)
            if len(others) > 1:
                raise ReportError(f"report.py: --vs expects one group, found {len(others)}: name one folder.")
            base = others[0]
        report(groups, base, args.margin, args.target)
        everything = [base] * (base is not None and base not in groups) + groups
        if not any(group.runs for group in groups):
            raise ReportError("report.py: found no complete log.")
        if args.csv:
            write_csv(everything, args.csv)
        if args.plot:
            draw(everything, args.plot, args.target)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"report.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
