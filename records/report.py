# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
report.py: what the logs of runs say, and which of two versions is faster or has the lower loss.

    python records/report.py DIR_OR_LOGS...           # the runs, their means, whether they meet the target
    python records/report.py NEW... --vs OLD...       # and the differences, with 95 % confidence intervals
    python records/report.py DIR --plot loss.png      # draw loss against steps and against training time
    python records/report.py --leaderboard [--check]  # write the tables in records/, or only check them

records/README.md says what a set of logs is and explains the figures.
"""

import argparse
import hashlib
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    from matplotlib.figure import Figure
    from scipy import stats
except ImportError as error:
    sys.exit(f"{error.name} is missing; in the Python that trains (. .venv/bin/activate, if ./run.sh has "
             "made it), run: python -m pip install -r requirements.txt -r records/requirements.txt")

RECORDS = Path(__file__).resolve().parent
TARGET = 3.28  # nats per token; of the published speedrun, whose logs have no settings
CLAIM = 0.01  # a claim that the mean loss meets the target needs a p-value below this
OTHER_LOGS = {".TXT", ".log", ".part"}  # suffixes of logs beside .txt, where the text has a line of 100 "="
MAY_DIFFER = {"seed", "log_dir", "data_path", "nproc", "checkpoint_every"}  # within one version
BEGIN, END = "<!-- from here: written by report.py --leaderboard -->", "<!-- to here -->"
COLUMNS = ["runs", "final loss", "p (mean ≤ target)", "reached", "time, s", "step, ms"]

class ReportError(Exception):
    """A user error: printed as one sentence, without a traceback."""

def read_utf8(path: Path) -> str:
    """The text of a file. Raises OSError, and ReportError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: expected a text in UTF-8, found {error}; save it as UTF-8.") from None

# ----------------------------------------------------------------------------------------------------------
# Logs: source or the name of its file, environment, settings and the lines of the run; between them a line of
# 100 "="

RULE = "\n" + "=" * 100 + "\n"
SOURCE = re.compile(r"source: (.+) sha256:([0-9a-f]{64})")  # in its place, by compact.py
SETTING = re.compile(r"^ *(\w+): (.*?)(?:  \(overridden\))?$", re.MULTILINE)
TRAINED = re.compile(r"^step:(\d+)/\d+ train_time:", re.MULTILINE)
VALIDATED = re.compile(r"^step:(\d+)/\d+ val_loss:([\d.]+) train_time:(\d+)", re.MULTILINE)

class Validation(NamedTuple):
    step: float  # whole, but where a target was crossed
    loss: float  # nats per token
    seconds: float  # training time so far

@dataclass
class Run:
    """One complete log."""
    path: Path
    source: str  # without the newlines at its end
    settings: dict[str, str]  # name -> repr of the value; empty in published logs
    target: float  # at which the run would stop, nats per token; 0 if it had none, as in published logs
    hardware: str
    software: str
    validations: dict[int, Validation]  # by step
    end: Validation  # at which the run is judged: the last, or that of --step
    finish: Validation  # whose time counts: where the run crossed its target, else the end
    round: Path | None  # RACE/round-01.txt: the same for all versions of a race; None for other logs

def read_log(path: Path, step: int = 0) -> Run:
    """Read the log of a complete run, judged at the validation after `step`, or at the last if that is 0.
    Raises OSError, and ReportError if the log is cut or damaged, its run was stopped or resumed, or the file
    of its source is missing or another."""
    source, *parts = path.read_text(encoding="utf-8", errors="replace").split(RULE)
    if len(parts) not in (2, 3):  # published logs have no settings
        raise ReportError(f"{path}: not a log: expected source, environment, settings and steps with lines "
                          f"of 100 '=' between them, found {len(parts)} such lines.")
    source = read_source(path, source)
    environment, lines = parts[0], parts[-1]
    settings = dict(SETTING.findall(parts[1])) if len(parts) == 3 else {}
    target = float(settings.get("target_loss", 0))
    trained = [int(number) for number in TRAINED.findall(lines)]
    validations = {int(number): Validation(int(number), float(loss), int(ms) / 1000)
                   for number, loss, ms in VALIDATED.findall(lines)}
    num_steps = len(trained)
    complete = trained == list(range(1, num_steps + 1)) and num_steps in validations
    if not complete or "\npeak memory allocated: " not in lines:
        raise ReportError(f"{path}: not the log of a complete run: expected all steps from 1 on, then a "
                          f"finite validation loss and a line on peak memory, found {num_steps} steps, and "
                          f"at the end {lines[-80:]!r}.")
    if step and step not in validations:
        raise ReportError(f"{path}: expected a validation at step {step}, found none.")
    end = finish = validations[step or num_steps]
    if target and not step and len(validations) > 1 and "\ntarget_reached:1 " in lines:
        finish = crossing(*list(validations.values())[-2:], target)
    race_round = path.resolve().parents[1] / path.name if path.name.startswith("round-") else None
    return Run(path, source.rstrip("\n"), settings, target, describe_hardware(environment, lines),
               describe_software(environment), validations, end, finish, race_round)

def crossing(before: Validation, after: Validation, target: float) -> Validation:
    """Where the straight line between two validations, loss against training time, comes to the target."""
    share = np.interp(target, [after.loss, before.loss], [1, 0])
    return Validation(before.step + share * (after.step - before.step), target,
                      before.seconds + share * (after.seconds - before.seconds))

def read_source(log: Path, head: str) -> str:
    """The source of a log that begins with `head`: that, or the file it names. Raises ReportError."""
    named = SOURCE.fullmatch(head)
    if not named:
        return head
    path = log.parent / named[1]
    if not path.is_file():
        raise ReportError(f"{log}: expected its source in {path}, found no such file; put it there.")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if digest != named[2]:
        raise ReportError(f"{log}: expected its source in {path}, with SHA-256 {named[2]}, found {digest}; "
                          "restore that file.")
    return source.decode(errors="replace")

def describe_hardware(environment: str, lines: str) -> str:
    """'8 x NVIDIA H100 80GB HBM3'; without a GPU '2 CPUs, 2 threads', or of two processes '2 CPUs, 2 x 1
    threads'."""
    gpus = re.findall(r"^\| +\d+ +(\S.*?) +\S+ +\| +[\dA-F]{4,}:", environment, re.MULTILINE)
    device = re.search(r"^device: (\w+)", lines, re.MULTILINE)  # not in published logs, as is the batch
    ranks = re.search(r"^batch: (\d+) rank", lines, re.MULTILINE)
    if device and device[1] == "cpu" or not (device or gpus):
        found = re.search(r"(\d+ CPUs), (\d+ threads)", environment)
        processes = f"{ranks[1]} x " if ranks and ranks[1] != "1" else ""
        return f"{found[1]}, {processes}{found[2]}" if found else "unknown"
    return f"{ranks[1] if ranks else len(gpus)} x {' or '.join(sorted(set(gpus))) or 'unknown GPU'}"

def describe_software(environment: str) -> str:
    """'Python 3.11.7, PyTorch 2.13.0+cpu'; 'unknown' if the log does not say so."""
    found = re.findall(r"^(?:Running )?(Python|PyTorch) (\S+)", environment, re.MULTILINE)
    return ", ".join(f"{name} {version.rstrip(',')}" for name, version in found) or "unknown"

# ----------------------------------------------------------------------------------------------------------
# Sets of runs

@dataclass
class Group:
    """The runs of one version."""
    label: str
    runs: list[Run]
    hardware: str
    target: float | None  # of --target, of race.json or of the runs [nats per token]; None without any
    times_compare: bool  # unless race.json says that they do not

def load(paths, step: int = 0, target: float | None = None) -> list[Group]:
    """The sets at these paths: of one path a set per folder of logs, of several paths one set of all logs.
    Raises OSError, and ReportError if a log is not complete, or those of a set are of different versions."""
    sets = [logs for path in paths for logs in find_logs(Path(path))]
    if len(paths) > 1:
        sets = [[log for logs in sets for log in logs]]
    return [load_group(logs, step, target) for logs in sets]

def find_logs(path: Path) -> list[list[Path]]:
    """The logs of each folder at and below this one, or the path itself if it is no folder.
    Versions that race.json lists come first. Raises OSError, and ReportError if logs are missing."""
    if not path.is_dir():
        return [[path]]
    folders = {}  # folder -> its logs
    for folder, files in walk(path, set()):
        logs = [file for file in files
                if file.suffix == ".txt" or file.suffix in OTHER_LOGS and has_rule(file)]
        if logs:
            folders[folder] = logs
    if len(folders) > 1 and not any(map(has_rule, folders.get(path, []))):
        folders.pop(path, None)  # beside the versions lie only texts of another kind
    versions = [path / label for label in race_labels(path)]
    missing = [version for version in versions if version not in folders]
    if missing or not folders:
        raise ReportError(f"{[*missing, path][0]}: expected logs (*.txt) of one version, found none.")
    return [folders[folder] for folder in dict.fromkeys([*versions, *folders])]

def walk(folder: Path, seen: set[Path]):
    """Each folder from this one on, with its files, in order; one that links lead to again comes once."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    entries = sorted(folder.iterdir())
    yield folder, [entry for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from walk(entry, seen)

def has_rule(path: Path) -> bool:
    """Whether a text has a line of 100 "=", as every log has."""
    return RULE in path.read_text(encoding="utf-8", errors="replace")

def read_race(race: Path) -> dict:
    """What the race.json of this folder says; nothing without this file. Raises ReportError."""
    path = race / "race.json"
    try:
        return json.loads(read_utf8(path)) if path.is_file() else {}
    except ValueError as error:
        raise ReportError(f"{path}: expected JSON, found {error}; mend it.") from None

def race_labels(race: Path) -> list[str]:
    """Labels of the versions of a race, in the order of its race.json; none without this file."""
    return [version["label"] for version in read_race(race).get("versions", [])]

def load_group(logs: list[Path], step: int, target: float | None) -> Group:
    """The set of these logs. Raises OSError, and ReportError if they are not of one version."""
    runs = [read_log(log, step) for log in logs]
    for number, run in enumerate(runs):
        if differ := differences(runs[0], run, MAY_DIFFER):
            raise ReportError(f"{runs[0].path} and {run.path} differ in {differ}: put --vs between versions.")
        if run.hardware != runs[0].hardware:
            raise ReportError(f"{runs[0].path} and {run.path} differ in hardware ({runs[0].hardware}; "
                              f"{run.hardware}), so their times are no set: put --vs between machines.")
        if run.validations in [other.validations for other in runs[:number]]:
            raise ReportError(f"{run.path}: the same run as another log; name it once.")
    folder = runs[0].path.resolve().parent
    about = read_race(folder.parent) | read_race(folder)
    own_target = runs[0].target if runs[0].settings else TARGET
    target = target or about.get("target") or own_target or None
    return Group(folder.name, runs, runs[0].hardware, target, about.get("times_compare", True))

def differences(one, other, may_differ: set[str]) -> str:
    """'mlp_dim (512, 384), source': where the settings and source of two runs or versions differ."""
    found = []
    for name in {**one.settings, **other.settings}:
        a, b = one.settings.get(name), other.settings.get(name)
        if a != b and name not in may_differ:
            found.append(f"{name} ({a}, {b})")
    if one.source != other.source:
        found.append("source")
    return ", ".join(found)

# ----------------------------------------------------------------------------------------------------------
# Statistics

def losses_of(runs: list[Run]) -> list[float]:
    """Nats per token."""
    return [run.end.loss for run in runs]

def times_of(runs: list[Run]) -> list[float]:
    """Seconds of training, to the target where a run stopped at one."""
    return [run.finish.seconds for run in runs]

def interval(new: list[float], old: list[float], paired: bool, rounding=0.0) -> tuple[float, float]:
    """Mean of new - old, and half its 95 % confidence interval, of pairs or after Welch; nan if too few.
    rounding: the unit to which each figure was rounded, whose deviation the figures may not show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of equal values, whose interval has no width
        test = stats.ttest_rel(new, old) if paired else stats.ttest_ind(new, old, equal_var=False)
        low, high = test.confidence_interval(0.95)
    count = min(len(new), len(old))
    deviation = rounding * (2 / 12 / count) ** 0.5  # of the mean difference, by rounding alone
    of_rounding = stats.t.ppf(0.975, count - 1) * deviation
    return np.mean(new) - np.mean(old), np.hypot((high - low) / 2, of_rounding)

def compare(new: Group, old: Group) -> str:
    """'paired over 5 rounds: faster by 1.42 ± 0.19 s (0.9914 ± 0.0011 of the time); loss lower by ...'"""
    new_runs, old_runs, way = new.runs, old.runs, "unpaired (a claim of speed needs a race)"
    pairs = [(a, b) for a in new.runs for b in old.runs if a.round and a.round == b.round]
    if pairs:
        new_runs, old_runs = zip(*pairs)
        way = f"paired over {len(pairs)} rounds"
    said = []
    if new.times_compare and old.times_compare:
        said.append(compare_times(new_runs, old_runs, bool(pairs)))
    if same_step([*new_runs, *old_runs]) or (at_fixed_step(new) and at_fixed_step(old)):
        loss = interval(losses_of(new_runs), losses_of(old_runs), bool(pairs), rounding=1e-4)
        said.append(verdict("loss", loss, "loss lower", "loss higher", 4))
    return f"{way}: {'; '.join(said) or 'nothing compares, since runs ended at different steps'}"

def compare_times(new: list[Run], old: list[Run], paired: bool) -> str:
    """'faster by 1.42 ± 0.19 s (0.9914 ± 0.0011 of the time)'; no verdict between unlike hardware, or if some
    runs did not reach their target and ended at other steps."""
    if new[0].hardware != old[0].hardware:
        return f"times of unlike hardware do not compare ({new[0].hardware}; {old[0].hardware})"
    late = [sum(run.target > 0 and run.end.loss > run.target for run in runs) for runs in (new, old)]
    if any(late) and not same_step([*new, *old]):
        return f"times do not compare, since {late[0]} and {late[1]} runs did not reach their target"
    new_times, old_times = times_of(new), times_of(old)
    time = interval(new_times, old_times, paired)
    log_ratio, log_half = interval(np.log(new_times), np.log(old_times), paired)  # log of the ratio
    ratio = plus_minus(np.exp(log_ratio), np.exp(log_ratio) * np.sinh(log_half), 4)
    return f"{verdict('time', time, 'faster', 'slower', 2, ' s')} ({ratio} of the time)"

def verdict(what: str, difference: tuple[float, float], below: str, above: str, digits: int, unit="") -> str:
    """'faster by 1.42 ± 0.19 s', or that there is no clear difference."""
    value, half = difference
    if abs(value) > half:
        return f"{below if value < 0 else above} by {plus_minus(abs(value), half, digits)}{unit}"
    why = "too few runs to judge" if np.isnan(half) else "no clear difference in"
    return f"{why} {what}: {plus_minus(value, half, digits, '+')}{unit}"

def plus_minus(value: float, half: float, digits: int, sign="") -> str:
    return f"{value:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")

def spread(figures: list[float], digits: int) -> str:
    """'1.6711 ± 0.0106': mean and standard deviation."""
    return plus_minus(np.mean(figures), np.std(figures, ddof=1) if len(figures) > 1 else np.nan, digits)

def same_step(runs: list[Run]) -> bool:
    """Whether all are judged at one step."""
    return len({run.end.step for run in runs}) == 1

def at_fixed_step(group: Group) -> bool:
    """Whether all runs are judged at one step, and had no target at which they would have stopped."""
    return same_step(group.runs) and not any(run.target for run in group.runs)

def p_value(group: Group) -> float:
    """p of the one-sided t-test that the mean loss is below the target; nan without two different losses, and
    for runs that would stop at a target, whose last loss is below it by that choice."""
    losses = losses_of(group.runs)
    if len(set(losses)) < 2 or group.target is None or not at_fixed_step(group):
        return np.nan
    return stats.ttest_1samp(losses, group.target, alternative="less").pvalue

def reached(group: Group) -> str:
    """How many runs came to the target, and the step: '10 of 10, at step 90 to 100', '0 of 3'."""
    steps = []  # where each run crossed its own target, or its first validation at or below another
    for run in group.runs:
        points = sorted([*run.validations.values(), run.finish])
        steps += [round(point.step) for point in points if point.loss <= group.target][:1]
    if not steps:
        return f"0 of {len(group.runs)}"
    first_and_last = sorted({min(steps), max(steps)})
    return f"{len(steps)} of {len(group.runs)}, at step {' to '.join(map(str, first_and_last))}"

# ----------------------------------------------------------------------------------------------------------
# Output: text, curves, and the tables of the records

def cells(group: Group) -> list[str]:
    """The cells under COLUMNS; ± is the standard deviation over runs."""
    p = p_value(group)
    times = ["-", "-"]
    if group.times_compare:
        times = [spread(times_of(group.runs), 2),
                 spread([1000 * run.end.seconds / max(run.end.step, 1) for run in group.runs], 1)]
    return [str(len(group.runs)),
            spread(losses_of(group.runs), 4),
            "-" if np.isnan(p) else f"{p:.2g} ({group.target:g})",
            reached(group) if group.target else "-",
            *times]

def report(groups: list[Group]) -> None:
    """Print each set, whether it meets its target, and how it differs from the first."""
    for group in groups:
        print(f"{group.label}, {group.hardware}")
        for run in group.runs:
            crossed = f"; at its target in {run.finish.seconds:.2f} s" if run.finish != run.end else ""
            print(f"  {run.path.name}: seed {run.settings.get('seed', '-')}, loss {run.end.loss:.4f} at step "
                  f"{run.end.step}, {run.end.seconds:.2f} s{crossed}")
        figures = "; ".join(f"{name}: {cell}" for name, cell in zip(COLUMNS, cells(group)) if cell != "-")
        print(f"  {figures}" + " (± standard deviation)" * ("±" in figures))
        if group.target and not at_fixed_step(group):
            print("  no claim on the mean loss: expected runs to one step, with TARGET_LOSS=0")
        elif group.target:
            met = "meets" if p_value(group) < CLAIM else "is not shown to meet"
            print(f"  the mean loss {met} the target {group.target:g} with p < {CLAIM}")
    for group in groups[1:]:
        print(f"\n{group.label} against {groups[0].label}, {compare(group, groups[0])}")

def draw(groups: list[Group], path: str) -> None:
    """Draw the validation losses against steps and training time, from a tenth of the steps on."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, x, title in zip(axes, ("step", "seconds"), ("step", "training time, s")):
        for number, group in enumerate(groups):
            for run in group.runs:
                late = [point for point in run.validations.values() if point.step > run.end.step / 10]
                axis.plot([getattr(point, x) for point in late], [point.loss for point in late], "o-", lw=1,
                          ms=3, color=f"C{number % 10}", label=group.label if run is group.runs[0] else None)
        for target in {group.target for group in groups} - {None}:
            axis.axhline(target, color="black", ls="--", lw=1, label=f"target {target:g}")
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss, nats per token")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)

def leaderboard(check: bool) -> None:
    """Write the records' tables, and that of all sets with a target. Where times do not compare, a record's
    table is in the order of losses. Raises ReportError."""
    board = [["date", "what changed", "hardware", *COLUMNS]]
    for page in sorted(RECORDS.glob("????-??-??_*/README.md"), reverse=True):  # others are no records yet
        record, groups = page.parent, load([page.parent])
        title = read_utf8(page).partition("\n")[0].lstrip("# ")
        rounds = {f"round-{n:02}.txt" for n in range(1, 1 + max(len(group.runs) for group in groups))}
        first = groups[0]
        table = [["version", *COLUMNS, f"against {first.label}"]]
        if not first.times_compare:
            groups.sort(key=lambda group: np.mean(losses_of(group.runs)))
        for group in groups:
            missing = rounds - {run.path.name for run in group.runs}
            if group.runs[0].round and missing:
                raise ReportError(f"{record}, {group.label}: expected {min(missing)}, found none.")
            link = f"[{title}]({record.name})" + f": {group.label}" * (len(groups) > 1)
            if group.target:
                board.append([record.name[:10], link, group.hardware, *cells(group)])
            against = "-" if group is first else compare(group, first)
            table.append([group.label, *cells(group), against])
        write_table(page, without_empty_columns(table), check)
    write_table(RECORDS / "README.md", board, check)

def without_empty_columns(table: list[list[str]]) -> list[list[str]]:
    """A table without the columns that have "-" in each row below the first."""
    columns = [column for column in zip(*table) if set(column[1:]) != {"-"}]
    return [list(row) for row in zip(*columns)]

def write_table(page: Path, rows: list[list[str]], check: bool) -> None:
    """Write rows as the table between BEGIN and END, if the page has these; check: only compare them."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    old = read_utf8(page)
    new = re.sub(f"{BEGIN}\n.*?{END}", lambda _: f"{BEGIN}\n{table}{END}", old, count=1, flags=re.DOTALL)
    if not check:
        page.write_text(new, encoding="utf-8")
    elif new != old:
        raise ReportError(f"{page}: its table is not what the logs give; run report.py --leaderboard.")

def main(argv=None) -> int:
    """Returns the exit code: 0, 1 after one sentence on stderr, 130 after Ctrl-C; argparse exits with 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="DIR_OR_LOG")
    parser.add_argument("--vs", nargs="+", metavar="DIR_OR_LOG", help="the set to compare with")
    parser.add_argument("--step", type=int, default=0, help="take loss and time at this step, not the last")
    parser.add_argument("--target", type=float, help="target loss in nats per token, not the logs' own")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves")
    parser.add_argument("--leaderboard", action="store_true", help="write the tables of the records")
    parser.add_argument("--check", action="store_true", help="with --leaderboard: only check the tables")
    sys.stdout.reconfigure(errors="replace")  # a console need not have all characters
    args = parser.parse_args(argv)
    if bool(args.logs) == args.leaderboard:
        parser.error("expected either logs and folders of logs, or --leaderboard")
    if args.plot is not None and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot: expected a file name that ends in .png, .svg or .pdf, found {args.plot!r}")
    try:
        if args.leaderboard:
            leaderboard(args.check)
            return 0
        groups = load(args.vs, args.step, args.target) if args.vs else []
        groups += load(args.logs, args.step, args.target)
        report(groups)
        if args.plot:
            draw(groups, args.plot)
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
