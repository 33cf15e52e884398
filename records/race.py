# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
race.py: run versions in turn on this machine, A B C A B C ..., and compare each with the first.

    python records/race.py A B [C ...] -n 5 --name Gates     # logs in records/DATE_Gates/LABEL/round-01.txt
    TARGET_LOSS=0 python records/race.py "" "KEY_OFFSET=0 NGRAM_ROWS=0" glu:my_glu.py -n 5
    TARGET_LOSS=0 python records/race.py "" idea:+idea.patch "both:+idea.patch+other.patch" -n 5

A version is [LABEL:][REVISION or SCRIPT][+FILE.patch ...] [NAME=VALUE ...]: a git revision, the path of a
script, or this checkout's train_gpt.py, with patches (as git diff writes them) and settings. In round r all
run with SEED=r. All take as many processes as this checkout's train_gpt.py would; NPROC sets another number.
The same command continues a race that was stopped; a larger -n adds rounds. records/README.md has the
details.
"""

import argparse
import datetime
import fcntl
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from compact import compact
from report import (MAY_DIFFER, SETTING, ReportError, describe_hardware, describe_software, differences,
                    load, race_labels, read_log, read_race, read_utf8, report)
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
UTF8 = dict(text=True, encoding="utf-8", errors="replace")  # how what a child prints is read

@dataclass
class Version:
    label: str
    script: Path  # not used if there is a commit
    commit: str | None
    overrides: dict[str, str]
    patches: list[Path] = field(default_factory=list)  # applied in this order
    folder: Path | None = None  # where it runs; prepare() finds out this and what follows
    source: str = ""  # without the newlines at its end
    settings: dict[str, str] = field(default_factory=dict)  # name -> repr, as its --dry-run prints them
    plan: str = ""  # what its --dry-run prints
    nproc: int = 1

    def environment(self, seed: int) -> dict[str, str]:
        """The environment of a run: this process's, the number of processes, the round's seed, and the
        version's overrides."""
        env = {**processes_here(), **os.environ, "SEED": str(seed), **self.overrides, "LOG_DIR": "logs",
               "PYTHONIOENCODING": "utf-8"}
        if env.keys() & {"DATA_PATH", "TRAIN_FILES", "VAL_FILES"}:  # it runs in another folder
            env["DATA_PATH"] = os.path.abspath(env.get("DATA_PATH") or ROOT)
        return env

# ----------------------------------------------------------------------------------------------------------
# Versions

FORM = "[LABEL:][REVISION or SCRIPT][+FILE.patch ...] [NAME=VALUE ...]"

@cache
def processes_here() -> dict[str, str]:
    """NPROC as this checkout's train_gpt.py chooses it, and on a CPU each process's share of the threads, so
    that versions which choose in other ways run alike. Raises ReportError."""
    program = """
import os, train_gpt
s, _, _ = train_gpt.read_settings(os.environ)
device, _ = train_gpt.choose_device(s, train_gpt.Launcher())
count = train_gpt.count_processes(s, device)
print(f"NPROC={count}")
if count > 1 and device.type == "cpu":
    print(f"OMP_NUM_THREADS={train_gpt.threads_of_each(count)}")
"""
    return dict(line.split("=") for line in ask_train_gpt(program, dict(os.environ)).split())

@cache
def describe_machine(nproc: int) -> str:
    """The environment as a log of a run of `nproc` processes would have it here. Raises ReportError."""
    env = {**processes_here(), **os.environ}
    if nproc > 1:
        env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    return ask_train_gpt("import train_gpt; print(*train_gpt.describe_environment(), sep='\\n')", env)

def ask_train_gpt(program: str, env: dict[str, str]) -> str:
    """What a Python program that imports this checkout's train_gpt.py prints. Raises ReportError."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**env, "PYTHONIOENCODING": "utf-8"},
                          capture_output=True, **UTF8)
    if done.returncode:
        last_line = done.stderr.strip().splitlines()[-1]
        raise ReportError(f"{ROOT / 'train_gpt.py'} cannot say how it would run here: {last_line}")
    return done.stdout

def git(*arguments) -> str | None:
    """What git prints in this checkout, or None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, **UTF8)
    return None if done.returncode else done.stdout.strip()

def read_version(text: str) -> Version:
    """Read [LABEL:][REVISION or SCRIPT][+FILE.patch ...] [NAME=VALUE ...]. Raises ReportError."""
    label, rest = re.fullmatch(r"(?:(\w[\w.,+=-]*):)?(.*)", text, re.DOTALL).groups()
    try:
        words = shlex.split(rest)
        first = words.pop(0) if words and "=" not in words[0] else ""
        overrides = dict(word.split("=", 1) for word in words)
    except ValueError:  # an open quote, or a word without "="
        raise ReportError(f"{text!r}: expected {FORM}.") from None
    base, ends = re.fullmatch(r"(.*?)((?:\+[^+]+\.patch)*)", first, re.DOTALL).groups()
    patches = [Path(name) for name in ends.split("+")[1:]]
    for patch in patches:
        if not patch.is_file():
            raise ReportError(f"{text!r}: expected a patch at {patch}, found no such file.")
    script = Path(base) if base not in ("", "baseline") else ROOT / "train_gpt.py"
    commit = None if script.is_file() else git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if not script.is_file() and not commit:
        raise ReportError(f"{base!r}: expected a script, a git revision or NAME=VALUE, found none of these.")
    names = [Path(base).name.removesuffix(".py"), *(patch.stem for patch in patches)]
    name = "+".join(filter(None, names))
    default = re.sub(r"[^\w.,+=-]+", "_", "_".join([name, *words])).strip("_") or "baseline"
    return Version(label or default, script, commit, overrides, patches)

def apply_patch(patch: Path, folder: Path) -> None:
    """Change the files in a folder as a patch says. Raises ReportError."""
    # a repository above the folder is none of this one's: git would look there for the files
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--whitespace=nowarn", patch.resolve()]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, **UTF8)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[0].removeprefix("error: ").partition(" (allow ")[0]
        raise ReportError(f"{patch} does not apply: {reason}")

def prepare(version: Version, folder: Path, stack: ExitStack) -> None:
    """Make `folder` the place where the version runs, and read its settings. Raises ReportError."""
    version.folder, script = folder, folder / "train_gpt.py"
    if version.commit:
        stack.callback(git, "worktree", "remove", "--force", folder)
        if git("worktree", "add", "--detach", "--quiet", folder, version.commit) is None:
            raise ReportError(f"{version.label}: git worktree add failed for {version.commit}.")
    else:
        folder.mkdir()
        shutil.copyfile(version.script, script)
    for patch in version.patches:
        try:
            apply_patch(patch, folder)
        except ReportError as error:
            raise ReportError(f"{version.label}: {error}.") from None
    (folder / "data").mkdir(exist_ok=True)
    for entry in (ROOT / "data").glob("*"):  # the shards, which a worktree lacks because git ignores them
        if not (folder / "data" / entry.name).exists():
            (folder / "data" / entry.name).symlink_to(entry)
    version.source = read_utf8(script).rstrip("\n")
    done = subprocess.run([sys.executable, "train_gpt.py", "--dry-run"], cwd=folder,
                          env=version.environment(0), capture_output=True, **UTF8)
    if done.returncode:
        raise ReportError(f"{version.label} cannot run: {done.stderr.strip()}")
    version.plan = done.stdout
    settings = [line for line in version.plan.splitlines() if line.startswith("  ")]
    version.settings = dict(SETTING.findall("\n".join(settings)))
    batch = re.search(r"^batch: (\d+) rank", version.plan, re.MULTILINE)
    if not batch:
        raise ReportError(f"{version.label}: expected a train_gpt.py, found another script.")
    version.nproc = int(batch[1])
    unknown = version.overrides.keys() - {"PRESET", *map(str.upper, version.settings)}
    if unknown:
        raise ReportError(f"{version.label}: expected names of settings, found {', '.join(sorted(unknown))}.")

# ----------------------------------------------------------------------------------------------------------
# The race

# How far the verdict of a race with PRESET=proxy can be trusted
SMALL_RACE = (
    "PRESET=proxy shows that a change trains, not that it helps at full size: of 18 ideas with known result "
    "there, 7 of 13 winners and 1 of 4 losers had the right sign here, three runs each; rank correlation "
    "-0.10, p = 0.66 (records/2026-11-26_Proxy)."
)

def finished(turn: int, version: Version, log: Path) -> bool:
    """Whether this run was made. Raises ReportError if its log is not complete or not of this version."""
    if not log.exists():
        return False
    expected = replace(version, settings=version.settings | {"seed": version.environment(turn)["SEED"]})
    if differ := differences(read_log(log), expected, MAY_DIFFER - {"seed", "data_path"}):
        raise ReportError(f"{log} and {version.label} differ in {differ}: restore it, or name another --out.")
    return True

def check_hardware(version: Version, log: Path) -> None:
    """Raises ReportError if this log was made on other hardware, or with another PyTorch, than the version
    would be here."""
    run, machine = read_log(log), describe_machine(version.nproc)
    here, there = describe_hardware(machine, version.plan), run.hardware
    if there not in (here, "unknown"):
        raise ReportError(f"{log}: expected a run on this machine ({here}), found one on {there}: continue "
                          "the race there, or name another --out.")
    if describe_software(machine) != run.software != "unknown":
        raise ReportError(f"{log}: expected a run with {describe_software(machine)}, found {run.software}: "
                          "go on with that, or name another --out.")

DATA = {"train_files", "val_files", "val_tokens"}

def require_alike(versions: list[Version]) -> None:
    """Raises ReportError unless all versions take the same data, but for what one overrides itself, and all
    know the settings that the environment has for some."""
    first, *others = versions
    known = {name.upper() for version in versions for name in version.settings} - {"NPROC", "LOG_DIR"}
    for version in versions:
        unknown = sorted((known & os.environ.keys()) - {name.upper() for name in version.settings})
        if unknown:
            raise ReportError(f"{version.label}: expected settings that all versions have, found "
                              f"{', '.join(unknown)} in the environment; give it to those that have it.")
    for version in others:
        for name in sorted(DATA):
            here, there = version.settings.get(name), first.settings.get(name)
            if here != there and name.upper() not in {*version.overrides, *first.overrides}:
                raise ReportError(f"{version.label}: expected the data of {first.label} ({name} {there}), "
                                  f"found {here}; set {name.upper()} for all, or for one.")

def run_once(turn: int, version: Version, log: Path, progress: tqdm) -> None:
    """Run a version to its end and keep its log. Raises ReportError if it fails or its log is not whole."""
    shutil.rmtree(version.folder / "logs", ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={version.nproc}",
                f"--log-dir={version.folder.parent}"]  # else it leaves a folder among the temporary ones
    command = [sys.executable, *(torchrun if version.nproc > 1 else []), "train_gpt.py"]
    child = subprocess.Popen(command, cwd=version.folder, env=version.environment(turn),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **UTF8)
    name, output = f"round {turn}, {version.label}", []
    try:
        for line in child.stdout:
            output.append(line)
            if line.startswith("step:"):
                progress.set_postfix_str(f"{name}: {line.split()[0]}")
        child.wait()
    finally:  # no run goes on after its race has stopped
        child.terminate()
        child.wait()
    logs = list((version.folder / "logs").rglob("*.txt"))
    if child.returncode or len(logs) != 1:
        raise ReportError(f"{name}: exit code {child.returncode}, {len(logs)} logs. {''.join(output[-12:])}")
    part = log.with_suffix(".part")
    shutil.copyfile(logs[0], part)
    end = read_log(part).end  # raises ReportError if it is not whole
    compact(part, log.parents[1])
    part.replace(log)
    with console(), progress.external_write_mode():
        print(f"{name}: loss {end.loss:.4f} at step {end.step}, {end.seconds:.2f} s")

@contextmanager
def console():
    """What is printed in here is no part of the race: where it fails, stderr is told so once."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):
            print(f"cannot print on ({error}); the logs are kept as before", file=sys.stderr)

def describe_version(version: Version, out: Path) -> dict:
    """A version for race.json. Of one with patches: where they are, from race.json's folder, and the commit
    whose train_gpt.py they were applied to; None if no commit has it."""
    described = dict(label=version.label, commit=version.commit, overrides=version.overrides)
    if version.patches:
        base = version.commit
        is_this_checkouts = version.script == ROOT / "train_gpt.py"
        if base is None and is_this_checkouts and git("status", "--short", "train_gpt.py") == "":
            base = git("rev-parse", "HEAD")
        described["base"] = base
        described["patches"] = [Path(os.path.relpath(patch, out)).as_posix() for patch in version.patches]
    return described

def race(versions: list[Version], rounds: int, out: Path) -> None:
    """Run what is missing of a race. Raises ReportError, and KeyboardInterrupt if it is stopped."""
    with tempfile.TemporaryDirectory(prefix="race-") as place, ExitStack() as stack:
        for version in versions:
            prepare(version, Path(place) / version.label, stack)
        require_alike(versions)
        runs = [(turn, version, out / version.label / f"round-{turn:02}.txt")
                for turn in range(1, rounds + 1) for version in versions]
        todo = [run for run in runs if not finished(*run)]
        for run in runs:
            if todo and run not in todo:
                check_hardware(*run[1:])
        for version in versions:
            (out / version.label).mkdir(parents=True, exist_ok=True)
        described = [describe_version(version, out) for version in versions]
        about = read_race(out) | {"versions": described}
        (out / "race.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        with console():
            print(f"{len(versions)} versions, {rounds} rounds: {len(todo)} runs to do, logs in {out}")
        failed = []
        with tqdm(todo, unit="run", disable=None) as progress, only_race(out):
            for turn, version, log in progress:
                try:
                    run_once(turn, version, log, progress)
                except ReportError as error:  # the others may still tell something
                    failed.append(str(error))
                    with console(), progress.external_write_mode():
                        print(failed[-1])
        if failed:
            raise ReportError("\n".join([f"{len(failed)} of {len(todo)} runs failed; the same command tries "
                                         "them again:", *failed]))

@contextmanager
def only_race(out: Path):
    """Raises ReportError if another process races into this folder now."""
    with open(out / "race.json", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReportError(f"{out}: expected one race at a time, found another that is running; wait for "
                              "it, or name another --out.") from None
        yield

def out_folder(name: str) -> Path:
    """records/DATE_NAME, with the date of today or of the race that already has this name."""
    there = sorted((ROOT / "records").glob(f"????-??-??_{glob.escape(name)}/race.json"))
    return there[-1].parent if there else ROOT / "records" / f"{datetime.date.today()}_{name}"

def main(argv=None) -> int:
    """Returns the exit code: 0, 1 after one sentence on stderr, 130 if it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("-n", "--rounds", type=int, default=5, help="runs of each version (default: 5)")
    parser.add_argument("--name", default="Race", help="logs go to records/DATE_NAME (default: Race)")
    parser.add_argument("--out", type=Path, help="logs go to this folder instead")
    sys.stdout.reconfigure(errors="replace")  # a console need not have all characters
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, found {args.rounds}")
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) != signal.SIG_IGN:  # as nohup has it
            signal.signal(sign, signal.default_int_handler)
    out = args.out or out_folder(args.name)
    try:
        versions = [read_version(text) for text in args.versions]
        labels = [version.label for version in versions]
        if len(set(labels)) < len(labels):
            raise ReportError(f"expected different labels, found {labels}; put LABEL: in front of one.")
        logs = list(out.glob("*/*.txt"))
        begun = (race_labels(out) or sorted({log.parent.name for log in logs})) if logs else []
        if begun not in ([], labels):
            raise ReportError(f"{out}: expected a race of {labels}, found {begun}; choose another --name.")
        race(versions, args.rounds, out)
        groups = load([out])
        with console():
            report(groups)
            if all("preset: proxy" in version.plan for version in versions):
                print(f"\n{SMALL_RACE}")
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; the finished runs are in {out}, and the same command continues.", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
