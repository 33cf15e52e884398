"""
race.py: run versions in turn on this machine, A B C A B C, and report each against the first.

    python records/race.py A B [C ...] -n 5 --name Gates     # logs in records/DATE_Gates/LABEL/round-01.txt
    NUM_ITERATIONS=50 TARGET_LOSS=0 python records/race.py "" "SKIP_MLP=0,11" glu:variants/glu.py -n 5

A version is a git revision, the path of a script, or overrides such as "SKIP_MLP=0,11 SKIP_ATTN=" of this
checkout's train_gpt.py; "" or "baseline" is that script as it is; a revision or script may be followed by
overrides, and LABEL: in front names the version. Settings in the environment hold for all versions. In round
r all run with SEED=r, unless SEED is set. The same command goes on with a race that was stopped, or with a
larger -n adds rounds. Sources are read once, at the start: what is edited later is not raced.
"""

import argparse
import collections
import datetime
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
NOT_COMPARED = {"seed", "log_dir", "data_path", "nproc"}


class RaceError(Exception):
    """Something that the person who races can put right, in one sentence."""

    def __init__(self, problem: str, exit_code: int = 1):
        super().__init__(problem)
        self.exit_code = exit_code


@dataclass
class Version:
    """What one column of the race runs."""

    label: str
    spec: str  # as on the command line, less the label
    commit: str  # of a git revision, else ""
    source: str
    overrides: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)  # as its --dry-run prints them

    def described(self) -> dict:
        """As race.json keeps it."""
        kept = asdict(self) | {"sha256": hashlib.sha256(self.source.encode()).hexdigest()}
        kept["settings"] = {k: v for k, v in self.settings.items() if k not in NOT_COMPARED}
        return {k: v for k, v in kept.items() if k != "source"}


# ----------------------------------------------------------------------------------------------------
# Versions


def git(*arguments: str) -> str | None:
    """What git prints in this checkout, or None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def read_version(text: str) -> Version:
    """[LABEL:][REVISION | SCRIPT] [NAME=VALUE ...]. Raises RaceError (exit code 2)."""
    labelled = re.fullmatch(r"([A-Za-z0-9][\w.,+=-]*):(.*)", text, re.DOTALL)
    label, spec = labelled.groups() if labelled else (None, text)
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise RaceError(f"race.py: {text!r}: {error}.", 2) from None
    assigned = re.compile(r"[A-Z][A-Z0-9_]*=.*", re.DOTALL)
    base = words.pop(0) if words and not assigned.fullmatch(words[0]) else "baseline"
    wrong = [word for word in words if not assigned.fullmatch(word)]
    if wrong:
        raise RaceError(f"race.py: {text!r}: expected NAME=VALUE, found {wrong[0]!r}.", 2)
    commit, name = "", Path(base).stem
    try:
        if base == "baseline":
            source, name = (ROOT / "train_gpt.py").read_text(encoding="utf-8"), "" if words else base
        elif Path(base).is_file():
            source = Path(base).read_text(encoding="utf-8")
        else:
            commit, name = (git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}") or "").strip(), base
            source = git("show", f"{commit}:train_gpt.py") if commit else None
    except (OSError, UnicodeDecodeError) as error:
        raise RaceError(f"race.py: {base}: cannot be read: {error}.") from None
    if source is None:
        raise RaceError(f"race.py: {base!r} is no script, no git revision with a train_gpt.py, and no "
                        "NAME=VALUE.", 2)
    label = label or re.sub(r"[^\w.,+=-]", "_", "_".join([name, *words] if name else words)).lstrip(".")
    overrides = dict(word.split("=", 1) for word in words)
    return Version(label, spec, commit, source, overrides)


def stage(version: Version, folder: Path) -> None:
    """Make `folder` a checkout of this version: its script, and run.sh, requirements and data of this one."""
    folder.mkdir()
    (folder / "train_gpt.py").write_text(version.source, encoding="utf-8")
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("data", ".venv"):  # linked, so that no log names a place of this machine
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)


def environment(version: Version, seed: int) -> dict[str, str]:
    """Of a run: this one's, the version's overrides, the round's seed unless one is set; paths still hold."""
    env = {"PYTHON": sys.executable, "SEED": str(seed), **os.environ, **version.overrides}
    env.pop("LOG_DIR", None)  # it is moved from there
    for name in {"DATA_PATH"} & set(env):
        env[name] = str(Path(env[name]).resolve())
    return env


def check_version(version: Version, folder: Path, command: list[str]) -> None:
    """Ask the version for its settings, and so check them and its data. Raises RaceError with its message."""
    done = subprocess.run([*command, "--dry-run"], cwd=folder, env=environment(version, 0), text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise RaceError(f"race.py: {version.label} cannot run (exit code {done.returncode}): "
                        f"{last_lines(done.stderr or done.stdout)}", 2 if done.returncode == 2 else 1)
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    version.settings = {m[1]: m[2] for m in map(report.SETTING.fullmatch, lines) if m}
    known = {*version.settings, "preset"} - {"log_dir"}
    strange = [name for name in version.overrides if name.lower() not in known]
    if strange:
        raise RaceError(f"race.py: {version.label}: {strange[0]} is no setting to race with.", 2)


def last_lines(text: str) -> str:
    """The last of what a run printed, without torchrun's own report, which says no more of the cause."""
    ours = itertools.takewhile(lambda line: not re.match(r"[EWI]\d{4} .*torch", line), text.splitlines())
    return "\n".join([*ours][-12:]).rstrip() or "it printed nothing"


# ----------------------------------------------------------------------------------------------------
# The race


def open_race(out: Path, versions: list[Version], seeds: str):
    """race.json in `out`, new or of the same race, locked until it is closed. Raises RaceError."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "race.json", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RaceError(f"race.py: another race.py is at work in {out}; wait for it, or name another "
                        "--out.") from None
    file.seek(0)
    text, now = file.read(), [version.described() for version in versions]
    if not text:
        json.dump({"seeds": seeds, "versions": now}, file, indent=1)
        file.write("\n")
        file.flush()
        return file
    try:
        kept = json.loads(text)
        before, seeds_before = kept["versions"], kept.get("seeds", seeds)
        labels = [version["label"] for version in before]
    except (ValueError, KeyError, TypeError):
        raise RaceError(f"race.py: {out}/race.json is damaged; name another --out.") from None
    if labels != [version.label for version in versions]:
        raise RaceError(f"race.py: {out} holds a race of {' '.join(map(repr, labels))}; name another --out.")
    if seeds_before != seeds:
        raise RaceError(f"race.py: {out} holds a race with {seeds_before}, not {seeds}; name another --out.")
    for old, new in zip(before, now):
        for what in ("sha256", "overrides", "settings"):
            if old.get(what) != new[what]:
                raise RaceError(f"race.py: {new['label']} is not what {out} holds: its "
                                f"{changed(what, old, new)}; restore it, or name another --out.")
    return file


def changed(what: str, old: dict, new: dict) -> str:
    if what == "sha256":
        return "source has changed"
    old, new = old.get(what) or {}, new[what]
    return ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in {**old, **new}
                     if old.get(name) != new.get(name))


def finished(path: Path, version: Version) -> bool:
    """Whether a round's log is there. Raises RaceError where it is not one of this version."""
    if not path.exists():
        return False
    try:
        run = report.read_log(path)
    except report.ReportError as error:
        raise RaceError(f"race.py: {error}; delete that log to run it again.") from None
    if run.source != version.source:
        raise RaceError(f"race.py: {path} holds another source than {version.label}'s; delete it.")
    return True


class Progress:
    """Progress and time left: one live line on a terminal, a line a run in a pipe."""

    def __init__(self, todo: list[tuple[int, Version]], done: int):
        self.todo, self.before, self.walls, self.terminal = todo, done, {}, sys.stdout.isatty()

    def left(self, number: int, running: float = 0.0) -> str:
        """Time that todo[number:] takes, `running` seconds of it gone, by the mean of the runs so far."""
        known = [x for walls in self.walls.values() for x in walls]
        if not known:
            return "time left not known yet"
        ahead = [report.mean(self.walls.get(version.label, known)) for _, version in self.todo[number:]]
        seconds = max(sum(ahead) - running, 0)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"

    def name(self, number: int) -> str:
        turn, version = self.todo[number]
        count = f"run {self.before + number + 1} of {self.before + len(self.todo)}"
        return f"{count}: round {turn}, {version.label}"

    def live(self, number: int, step: str, running: float) -> None:
        if self.terminal:
            print(f"{self.clear()}{self.name(number)}: {step}, {running:.0f} s; {self.left(number, running)}",
                  end="", flush=True)

    def finish(self, number: int, wall: float, run: report.Run) -> None:
        self.walls.setdefault(self.todo[number][1].label, []).append(wall)
        print(f"{self.clear()}{self.name(number)}: loss {run.last.val_loss:.4f} at step "
              f"{run.last.step}/{run.num_steps}, {run.seconds:.1f} s of training, {wall:.0f} s in all; "
              f"{self.left(number + 1)}", flush=True)

    def clear(self) -> str:
        return "\r\033[K" if self.terminal else ""


def run_once(command: list[str], folder: Path, env: dict[str, str], live) -> tuple[int, str]:
    """Run to the end, calling live('step 3/108') at each step. Returns exit code and last lines.

    The child has a process group of its own: whatever ends this function ends all of the group.
    """
    shutil.rmtree(folder / "logs", ignore_errors=True)
    child = subprocess.Popen(command, cwd=folder, env=env, text=True, errors="replace",
                             start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    tail, at = collections.deque(maxlen=200), "starting"
    try:
        for line in child.stdout:
            tail.append(line)
            step = re.match(r"step:(\d+/\d+) ", line)
            at = f"step {step[1]}" if step else at
            live(at)
        return child.wait(), "".join(tail)
    finally:
        if child.poll() is None:
            stop(child)


def stop(child: subprocess.Popen) -> None:
    """End the child as Ctrl-C would (torchrun then ends its ranks), and its group by force after 20 s."""
    for sign, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(child.pid, sign)
            child.communicate(timeout=patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def take_log(folder: Path, path: Path, version: Version) -> report.Run:
    """Put the one log of the run in its place, whole or not at all. Raises RaceError for no whole log."""
    logs = sorted((folder / "logs").glob("*.txt"))
    if len(logs) != 1:
        raise RaceError(f"race.py: expected one log of {version.label}, found {len(logs)}.")
    try:
        run = report.read_log(logs[0])
    except report.ReportError as error:
        raise RaceError(f"race.py: {version.label} ended without a whole log: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(logs[0], path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    run.path = path
    return run


def race(versions: list[Version], rounds: int, base: int, out: Path, command: list[str]) -> None:
    """Run what is missing of `rounds` rounds. Raises RaceError, and KeyboardInterrupt for Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="race-") as place:
        folders = {version.label: Path(place) / version.label for version in versions}
        for version in versions:
            stage(version, folders[version.label])
            check_version(version, folders[version.label], command)
        seeds = f"SEED={os.environ['SEED']}" if "SEED" in os.environ else f"SEED={base} + round"
        with open_race(out, versions, seeds):
            turns = [(r, v) for r in range(1, rounds + 1) for v in versions]
            todo = [(r, v) for r, v in turns if not finished(out / v.label / f"round-{r:02}.txt", v)]
            progress = Progress(todo, len(turns) - len(todo))
            print(f"{len(versions)} versions, {rounds} rounds: {len(todo)} runs to do, logs in {out}",
                  flush=True)
            for number, (turn, version) in enumerate(todo):
                began, folder = time.monotonic(), folders[version.label]
                code, tail = run_once(command, folder, environment(version, base + turn),
                                      lambda step: progress.live(number, step, time.monotonic() - began))
                if code:
                    print(progress.clear() + last_lines(tail), file=sys.stderr)
                    raise RaceError(f"race.py: {progress.name(number)} ended with exit code {code}; the runs "
                                    f"before it are kept in {out}.")
                run = take_log(folder, out / version.label / f"round-{turn:02}.txt", version)
                progress.finish(number, time.monotonic() - began, run)


def out_folder(args) -> Path:
    """--out, or records/DATE_NAME: today's, or the one that a race of this name already has."""
    if args.out:
        return args.out
    there = sorted((ROOT / "records").glob(f"????-??-??_{args.name}/race.json"))
    return there[-1].parent if there else ROOT / "records" / f"{datetime.date.today()}_{args.name}"


def parse_arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("-n", "--rounds", type=int, default=5, help="runs of each version (default: 5)")
    parser.add_argument("--name", help="logs go to records/DATE_NAME (default: Race)", default="Race")
    parser.add_argument("--out", type=Path, help="logs go to this folder instead")
    parser.add_argument("--seed", type=int, default=0, metavar="BASE", help="round r has SEED = BASE + r")
    args = parser.parse_args(argv)
    if args.rounds < 1 or not re.fullmatch(r"[\w.+-]+", args.name):
        parser.error("expected at least one round, and a --name of letters, digits and . + -")
    return args


def main(argv=None, command=("bash", "run.sh")) -> int:
    """Returns the exit code. `command` starts a run in a folder that is a checkout of its version."""
    args = parse_arguments(argv)
    # a closed terminal too; and also where the shell has a background job ignore the first
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.default_int_handler)
    out = out_folder(args)
    try:
        versions = [read_version(text) for text in args.versions]
        labels = [version.label for version in versions]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise RaceError(f"race.py: two versions are called {twice[0]!r}; put LABEL: in front of one.", 2)
        race(versions, args.rounds, args.seed, out, list(command))
        groups = report.load([out])
        print()
        report.report(groups, groups[0] if len(groups) > 1 else None, report.MARGIN, None)
    except (RaceError, report.ReportError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except OSError as error:
        print(f"race.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nrace.py: stopped; the finished runs are kept in {out}, and the same command goes on.",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
