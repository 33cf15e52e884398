"""
race.py: run versions in turn on this machine, A B C A B C ..., and compare each with the first.

    python records/race.py A B [C ...] -n 5 --name Gates     # logs in records/DATE_Gates/LABEL/round-01.txt
    NUM_ITERATIONS=50 TARGET_LOSS=0 python records/race.py "" "SKIP_MLP=0,11" glu:variants/glu.py -n 5

A version is a git revision, the path of a script, or overrides such as "SKIP_MLP=0,11 SKIP_ATTN=" of this
checkout's train_gpt.py; "" or "baseline" is that script as it is. A revision or script may be followed by
overrides, and LABEL: in front names the version. Settings in the environment hold for all versions. In round
r all run with SEED=r, unless SEED is set. Each run uses all GPUs, or NPROC processes if that is set. Sources
are read once, at the start: later edits are not raced. The same command continues a race that was stopped;
a larger -n adds rounds.
"""

import argparse
import collections
import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import report

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)


class RaceError(Exception):
    """A user error: printed as one sentence; the exit code is 2 for wrong arguments and settings, else 1."""

    def __init__(self, problem: str, exit_code: int = 1):
        super().__init__(f"race.py: {problem}")
        self.exit_code = exit_code


@dataclass
class Version:
    label: str
    script: Path | None  # to copy; None for a git revision
    commit: str | None  # of a git revision
    overrides: dict[str, str]
    folder: Path | None = None  # where it runs
    settings: dict[str, str] = field(default_factory=dict)  # name -> repr, as its --dry-run prints them

    def environment(self, seed: int) -> dict[str, str]:
        """Of a run: this process's, the version's overrides, and the seed unless one is set."""
        env = {"SEED": str(seed), **os.environ, **self.overrides, "LOG_DIR": "logs"}
        if env.get("DATA_PATH"):
            env["DATA_PATH"] = str(Path(env["DATA_PATH"]).resolve())
        return env

    def command(self) -> list[str]:
        """Plain Python for one process, else torchrun. Raises RaceError for a wrong NPROC."""
        text = self.environment(0).get("NPROC") or "0"
        if not text.isdecimal():
            raise RaceError(f"{self.label}: NPROC: expected a number of processes, found {text!r}.", 2)
        nproc = int(text) or torch.cuda.device_count()
        if nproc <= 1:
            return [sys.executable, "train_gpt.py"]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}",
                "train_gpt.py"]


# ----------------------------------------------------------------------------------------------------
# Versions


def git(*arguments) -> str | None:
    """What git prints in this checkout, or None if it fails."""
    done = subprocess.run(["git", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def read_version(text: str) -> Version:
    """Read [LABEL:][REVISION | SCRIPT] [NAME=VALUE ...]. Raises RaceError with exit code 2."""
    labelled = re.fullmatch(r"([A-Za-z0-9][\w.,+=-]*):(.*)", text, re.DOTALL)
    label, text = labelled.groups() if labelled else ("", text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RaceError(f"{text!r}: {error}.", 2) from None
    base = words.pop(0) if words and not ASSIGNMENT.fullmatch(words[0]) else "baseline"
    wrong = [word for word in words if not ASSIGNMENT.fullmatch(word)]
    if wrong:
        raise RaceError(f"{text!r}: expected NAME=VALUE, found {wrong[0]!r}.", 2)
    script = ROOT / "train_gpt.py" if base == "baseline" else Path(base)
    commit = None if script.is_file() else git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if not script.is_file() and not commit:
        raise RaceError(f"{base!r}: expected a script, a git revision or NAME=VALUE, found none of them.", 2)
    names = [base if commit or base == "baseline" else script.stem, *words]
    names = names[1:] if base == "baseline" and words else names
    label = label or re.sub(r"[^\w.,+=-]", "_", "_".join(names)).lstrip(".")
    overrides = dict(ASSIGNMENT.fullmatch(word).groups() for word in words)
    return Version(label, None if commit else script, commit, overrides)


def stage(version: Version, folder: Path, stack: contextlib.ExitStack) -> None:
    """Make `folder` the place where the version runs: a git worktree, or a copy of its script."""
    version.folder = folder
    if version.commit:
        stack.callback(git, "worktree", "remove", "--force", folder)
        if git("worktree", "add", "--detach", "--quiet", folder, version.commit) is None:
            raise RaceError(f"{version.label}: git worktree add failed for {version.commit}.")
    else:
        folder.mkdir()
        shutil.copyfile(version.script, folder / "train_gpt.py")
        (folder / "data").symlink_to(ROOT / "data")  # so that the log names no path of this machine
    for entry in (ROOT / "data").glob("*"):  # a worktree has no data that git ignores
        if not (folder / "data" / entry.name).exists():
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / entry.name).symlink_to(entry)


def check_settings(version: Version) -> None:
    """Read the version's settings from its --dry-run. Raises RaceError with what that prints if it fails."""
    version.command()  # raises RaceError for a wrong NPROC
    done = subprocess.run([sys.executable, "train_gpt.py", "--dry-run"], cwd=version.folder, text=True,
                          env=version.environment(0), capture_output=True)
    if done.returncode:
        problem = (done.stderr or done.stdout).strip() or "it prints nothing"
        raise RaceError(f"{version.label} cannot run: {problem}", 2 if done.returncode == 2 else 1)
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    version.settings = dict(report.SETTING.findall("\n".join(lines)))
    for name in version.overrides:
        if name.lower() not in {*version.settings, "preset", "nproc"} - {"log_dir"}:
            raise RaceError(f"{version.label}: {name} is not a setting that a race can override.", 2)


# ----------------------------------------------------------------------------------------------------
# The race


def open_race(out: Path, versions: list[Version]) -> None:
    """Write race.json, which keeps the versions and their order. Raises RaceError if it has others."""
    labels, kept = [version.label for version in versions], report.race_labels(out)
    if kept and kept != labels:
        raise RaceError(f"{out}: expected a race of {', '.join(labels)}, found one of {', '.join(kept)}; "
                        "name another --out.")
    if not kept:
        described = [dict(label=v.label, commit=v.commit, overrides=v.overrides) for v in versions]
        save(out / "race.json", json.dumps({"versions": described}, indent=1) + "\n")


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def finished(log: Path, version: Version, seed: int) -> bool:
    """Whether this round was run. Raises RaceError if its log is not complete or not of this version."""
    if not log.exists():
        return False
    try:
        run = report.read_log(log)
    except report.ReportError as error:
        raise RaceError(f"{error} Delete this log to run it again.") from None
    wanted = version.settings | {"seed": version.environment(seed)["SEED"]}
    changed = [f"{name} was {run.settings[name]}, is {wanted[name]}" for name in wanted
               if name in run.settings and run.settings[name] != wanted[name]
               and (name == "seed" or name not in report.MAY_DIFFER)]
    if run.source != (version.folder / "train_gpt.py").read_text(encoding="utf-8").rstrip("\n"):
        changed.append("its source has changed")
    if changed:
        raise RaceError(f"{log} is not of {version.label} as it is now: {', '.join(changed)}; restore it, or "
                        "name another --out.")
    return True


def run_once(version: Version, seed: int, show) -> str:
    """Run a version to its end, calling show('step:3/108') at each step, and return its log.

    Raises RaceError or ReportError if the run fails or leaves no complete log. If this process is stopped, so
    is the run.
    """
    shutil.rmtree(version.folder / "logs", ignore_errors=True)
    child = subprocess.Popen(version.command(), cwd=version.folder, env=version.environment(seed), text=True,
                             errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tail = collections.deque(maxlen=12)
    try:
        for line in child.stdout:
            tail.append(line)
            if line.startswith("step:"):
                show(line.split()[0])
        code = child.wait()
    finally:  # Ctrl-C reaches the child too: it is in this process's group
        if child.poll() is None:
            child.terminate()
            child.wait()
    if code:
        raise RaceError(f"{version.label}, seed {seed}: the run ended with exit code {code}: {''.join(tail)}")
    logs = list((version.folder / "logs").rglob("*.txt"))
    if len(logs) != 1:
        raise RaceError(f"{version.label}, seed {seed}: expected one log of its run, found {len(logs)}.")
    report.read_log(logs[0])  # raises ReportError if it is not complete
    return logs[0].read_text(encoding="utf-8")


def race(versions: list[Version], rounds: int, out: Path) -> None:
    """Run what is missing of a race. Raises RaceError, and KeyboardInterrupt if it is stopped."""
    with tempfile.TemporaryDirectory(prefix="race-") as place, contextlib.ExitStack() as stack:
        for version in versions:
            stage(version, Path(place) / version.label, stack)
        for version in versions:
            check_settings(version)
        turns = [(turn, version, out / version.label / f"round-{turn:02}.txt")
                 for turn in range(1, rounds + 1) for version in versions]
        todo = [(turn, version, log) for turn, version, log in turns if not finished(log, version, turn)]
        open_race(out, versions)
        print(f"{len(versions)} versions, {rounds} rounds: {len(todo)} runs to do, logs in {out}", flush=True)
        with tqdm(todo, unit="run", disable=None) as progress:
            for turn, version, log in progress:
                name = f"round {turn}, {version.label}"
                save(log, run_once(version, turn, lambda step: progress.set_postfix_str(f"{name}: {step}")))
                run = report.read_log(log)
                progress.write(f"{name}: loss {run.loss:.4f} at step {run.step}, {run.seconds:.2f} s")


def out_folder(name: str) -> Path:
    """records/DATE_NAME, with the date of today or of the race that already has this name."""
    there = sorted((ROOT / "records").glob(f"????-??-??_{name}/race.json"))
    return there[-1].parent if there else ROOT / "records" / f"{datetime.date.today()}_{name}"


def main(argv=None) -> int:
    """Returns the exit code: 0, 1 or 2 after one sentence on stderr, 130 if it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("-n", "--rounds", type=int, default=5, help="runs of each version (default: 5)")
    parser.add_argument("--name", default="Race", help="logs go to records/DATE_NAME (default: Race)")
    parser.add_argument("--out", type=Path, help="logs go to this folder instead")
    args = parser.parse_args(argv)
    if args.rounds < 1 or not re.fullmatch(r"[\w.+-]+", args.name):
        parser.error("expected at least one round, and a --name of letters, digits and . + -")
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.default_int_handler)
    out = args.out or out_folder(args.name)
    try:
        versions = [read_version(text) for text in args.versions]
        labels = [version.label for version in versions]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise RaceError(f"two versions have the label {twice[0]!r}; put LABEL: in front of one.", 2)
        race(versions, args.rounds, out)
        print()
        report.report(report.load([out]))
    except (RaceError, report.ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print(f"\nrace.py: stopped; the finished runs are in {out}, and the same command continues.",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
