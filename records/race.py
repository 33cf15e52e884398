"""
race.py: run versions in turn on this machine, A B C A B C ..., and compare each with the first.

    python records/race.py A B [C ...] -n 5 --name Gates     # logs in records/DATE_Gates/LABEL/round-01.txt
    TARGET_LOSS=0 python records/race.py "" "KEY_OFFSET=0 NGRAM_ROWS=0" glu:variants/glu.py -n 5

A version is a git revision, the path of a script, or overrides such as "KEY_OFFSET=0 NGRAM_ROWS=0" of this
checkout's train_gpt.py; "" or "baseline" is that script as it is. A revision or script may be followed by
overrides, and LABEL: in front names the version. Settings in the environment hold for all versions, and in
round r all run with SEED=r. The same command continues a race that was stopped; a larger -n adds rounds.
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

from tqdm import tqdm

import report
from report import ReportError

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)


@dataclass
class Version:
    label: str
    script: Path | None  # None for a git revision
    commit: str | None  # None for a script
    overrides: dict[str, str]
    # what prepare() finds out
    folder: Path | None = None  # where it runs
    source: str = ""  # without the newlines at its end
    settings: dict[str, str] = field(default_factory=dict)  # name -> repr, as its --dry-run prints them
    nproc: int = 1

    def environment(self, seed: int) -> dict[str, str]:
        """Of a run: this process's, the version's overrides, and the seed unless one is set."""
        env = {"SEED": str(seed), **os.environ, **self.overrides, "LOG_DIR": "logs"}
        if env.get("DATA_PATH"):
            env["DATA_PATH"] = str(Path(env["DATA_PATH"]).resolve())
        return env


# ----------------------------------------------------------------------------------------------------
# Versions


def git(*arguments) -> str | None:
    """What git prints in this checkout, or None if it fails."""
    done = subprocess.run(["git", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def read_version(text: str) -> Version:
    """Read [LABEL:][REVISION | SCRIPT] [NAME=VALUE ...]. Raises ReportError."""
    labelled = re.fullmatch(r"([A-Za-z0-9][\w.,+=-]*):(.*)", text, re.DOTALL)
    label, text = labelled.groups() if labelled else ("", text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ReportError(f"{text!r}: {error}.") from None
    base = words.pop(0) if words and not ASSIGNMENT.fullmatch(words[0]) else "baseline"
    wrong = [word for word in words if not ASSIGNMENT.fullmatch(word)]
    if wrong:
        raise ReportError(f"{text!r}: expected NAME=VALUE, found {wrong[0]!r}.")
    overrides = dict(ASSIGNMENT.fullmatch(word).groups() for word in words)
    if base == "baseline":
        script, names = ROOT / "train_gpt.py", words or ["baseline"]
    else:
        script = Path(base)
        names = [script.stem if script.is_file() else base, *words]
    commit = None if script.is_file() else git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if not script.is_file() and not commit:
        raise ReportError(f"{base!r}: expected a script, a git revision or NAME=VALUE, found none of them.")
    label = label or re.sub(r"[^\w.,+=-]", "_", "_".join(names))
    return Version(label, None if commit else script, commit, overrides)


def prepare(version: Version, folder: Path, stack: contextlib.ExitStack) -> None:
    """Make `folder` the place where the version runs, and read its settings. Raises ReportError."""
    version.folder, script = folder, folder / "train_gpt.py"
    if version.commit:
        stack.callback(git, "worktree", "remove", "--force", folder)
        if git("worktree", "add", "--detach", "--quiet", folder, version.commit) is None:
            raise ReportError(f"{version.label}: git worktree add failed for {version.commit}.")
    else:
        folder.mkdir()
        shutil.copyfile(version.script, script)
    (folder / "data").mkdir(exist_ok=True)
    for entry in (ROOT / "data").glob("*"):  # the shards, which a worktree lacks because git ignores them
        if not (folder / "data" / entry.name).exists():
            (folder / "data" / entry.name).symlink_to(entry)
    version.source = script.read_text(encoding="utf-8").rstrip("\n")
    done = subprocess.run([sys.executable, "train_gpt.py", "--dry-run"], cwd=folder, text=True,
                          env=version.environment(0), capture_output=True)
    if done.returncode:
        problem = (done.stderr or done.stdout).strip() or "it prints nothing"
        raise ReportError(f"{version.label} cannot run: {problem}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    version.settings = dict(report.SETTING.findall("\n".join(lines)))
    batch = re.search(r"^batch: (\d+) rank", done.stdout, re.MULTILINE)
    version.nproc = int(batch[1]) if batch else 1
    for name in version.overrides:
        if name.lower() not in {*version.settings, "preset"} - {"log_dir"}:
            raise ReportError(f"{version.label}: {name} is not a setting that a race can override.")


# ----------------------------------------------------------------------------------------------------
# The race


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def finished(log: Path, version: Version, turn: int) -> bool:
    """Whether this round was run. Raises ReportError if its log is not complete or not of this version."""
    if not log.exists():
        return False
    run, seed = report.read_log(log), version.environment(turn)["SEED"]
    differ = report.differences(run, version, report.MAY_DIFFER)
    if run.settings.get("seed") != seed:
        differ += f" seed ({run.settings.get('seed')}, {seed})"
    if differ:
        raise ReportError(f"{log} is not of {version.label} as it is now: they differ in {differ.strip()}; "
                          "restore it, or name another --out.")
    return True


def run_once(version: Version, seed: int, show) -> str:
    """Run a version to its end, calling show('step:3/108') at each step, and return its log.

    Raises ReportError if the run fails or leaves no complete log. A run is stopped with this process.
    """
    shutil.rmtree(version.folder / "logs", ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={version.nproc}"]
    command = [sys.executable, *(torchrun if version.nproc > 1 else []), "train_gpt.py"]
    child = subprocess.Popen(command, cwd=version.folder, env=version.environment(seed), text=True,
                             errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tail = collections.deque(maxlen=12)
    try:
        for line in child.stdout:
            tail.append(line)
            if line.startswith("step:"):
                show(line.split()[0])
        code = child.wait()
    finally:  # Ctrl-C reaches the child too: it is in this process's group
        child.terminate()
        child.wait()
    if code:
        raise ReportError(f"{version.label}, seed {seed}: its run ended with exit code {code}: "
                          f"{''.join(tail)}")
    logs = list((version.folder / "logs").rglob("*.txt"))
    if len(logs) != 1:
        raise ReportError(f"{version.label}, seed {seed}: expected one log of its run, found {len(logs)}.")
    report.read_log(logs[0])  # raises ReportError if it is not complete
    return logs[0].read_text(encoding="utf-8")


def race(versions: list[Version], rounds: int, out: Path) -> None:
    """Run what is missing of a race. Raises ReportError, and KeyboardInterrupt if it is stopped."""
    with tempfile.TemporaryDirectory(prefix="race-") as place, contextlib.ExitStack() as stack:
        for version in versions:
            prepare(version, Path(place) / version.label, stack)
        turns = [(turn, version, out / version.label / f"round-{turn:02}.txt")
                 for turn in range(1, rounds + 1) for version in versions]
        todo = [(turn, version, log) for turn, version, log in turns if not finished(log, version, turn)]
        described = [dict(label=v.label, commit=v.commit, overrides=v.overrides) for v in versions]
        save(out / "race.json", json.dumps({"versions": described}, indent=1) + "\n")
        print(f"{len(versions)} versions, {rounds} rounds: {len(todo)} runs to do, logs in {out}", flush=True)
        with tqdm(todo, unit="run", disable=None) as progress:
            for turn, version, log in progress:
                name = f"round {turn}, {version.label}"
                save(log, run_once(version, turn, lambda step: progress.set_postfix_str(f"{name}: {step}")))
                end = report.read_log(log).end
                progress.write(f"{name}: loss {end.loss:.4f} at step {end.step}, {end.seconds:.2f} s")


def out_folder(name: str) -> Path:
    """records/DATE_NAME, with the date of today or of the race that already has this name."""
    there = sorted((ROOT / "records").glob(f"????-??-??_{name}/race.json"))
    return there[-1].parent if there else ROOT / "records" / f"{datetime.date.today()}_{name}"


def main(argv=None) -> int:
    """Returns the exit code: 0, 1 after one sentence on stderr, 130 if it was stopped."""
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
        labels, begun = [version.label for version in versions], report.race_labels(out)
        if len(set(labels)) < len(labels):
            raise ReportError(f"{', '.join(labels)}: expected different labels; put LABEL: in front of one.")
        if begun and begun != labels:
            raise ReportError(f"{out}: expected a race of {', '.join(labels)}, found one of "
                              f"{', '.join(begun)}; name another --out.")
        race(versions, args.rounds, out)
        print()
        report.report(report.load([out]))
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nrace.py: stopped; the finished runs are in {out}, and the same command continues.",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
