"""race.py: versions, turns, seeds, continuing, failures; with a small script in place of train_gpt.py."""

import difflib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment
from test_report import our_log, report

import race

describe_machine = race.describe_machine
processes_here = race.processes_here

# Logs its settings as train_gpt.py does, takes no time, and appends its name, WIDTH and SEED to $CALLS.
SCRIPT = """
import os, sys, time
from pathlib import Path
value = {name: os.environ.get(name.upper(), "1") for name in ("seed", "width", "target_loss")}
if value["width"] == "0":
    print("WIDTH: expected at least 1, found 0.", file=sys.stderr)
    sys.exit(2)
if "--dry-run" in sys.argv:
    lines = [f"  {name}: {x}" for name, x in value.items()]
    lines.append(f"preset: {os.environ.get('PRESET', 'demo')}, set by PRESET")
    print("settings:", *lines, f"batch: {os.environ.get('NPROC', 1)} ranks", sep="\\n")
    sys.exit()
print("step:1/4 train_time:1ms step_avg:1.00ms", flush=True)
with open(os.environ["CALLS"], "a") as calls:
    print(NAME, value["width"], value["seed"], file=calls)
if os.environ.get("FAIL") == f"{NAME} {value['seed']}":
    sys.exit("the loss is not finite")
if os.environ.get("HANG") == f"{NAME} {value['seed']}":
    time.sleep(60)
log = LOG.replace("train_time:1600", f"train_time:{1600 + int(value['seed'])}")
log = log.replace("seed: 0", "seed: " + value["seed"])
log = log.replace("target_loss: 1.7", "target_loss: " + value["target_loss"])
log = log.replace("log_dir: 'logs'", "log_dir: 'logs'\\nwidth: " + value["width"])
path = Path(os.environ["LOG_DIR"]) / LOG_NAME
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(log.replace("print(1)\\n", Path(__file__).read_text()))
"""


class Race:
    """Scripts a.py, whose log is LOG_DIR/<run>.txt, and b.py, whose log is LOG_DIR/<run>/log.txt."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.out, self.calls, self.capsys = folder, folder / "out", folder / "calls", capsys
        for name in os.environ.keys() - environment().keys():
            monkeypatch.delenv(name)
        monkeypatch.setenv("CALLS", str(self.calls))
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr("tempfile.tempdir", None)
        machine = "Python 3.11\n2 CPUs, 2 threads"  # as in our_log
        monkeypatch.setattr(race, "describe_machine", lambda nproc: machine)
        monkeypatch.setattr(race, "processes_here", lambda: {"NPROC": "1"})
        self.a, self.b = self.script("a"), self.script("b")

    def script(self, name, extra=""):
        path = self.folder / f"{name}.py"
        log_name = "run.txt" if name == "a" else "run/log.txt"
        log = our_log(1.0, ms=400.0)
        path.write_text(f"NAME, LOG, LOG_NAME = {name!r}, {log!r}, {log_name!r}\n{SCRIPT}{extra}")
        return str(path)

    def patch(self, name, old, new):
        """A patch that changes a line of a.py, with a sentence above it."""
        before = Path(self.a).read_text().splitlines(keepends=True)
        after = [line.replace(old, new) for line in before]
        path = self.folder / f"{name}.patch"
        diff = difflib.unified_diff(before, after, "a/train_gpt.py", "b/train_gpt.py")
        path.write_text("What it is for.\n\n" + "".join(diff))
        return path

    def run(self, *arguments):
        """Exit code, the calls that were made, stdout and stderr."""
        self.calls.write_text("")
        code = race.main([*map(str, arguments), "--out", str(self.out)])
        return code, self.calls.read_text().splitlines(), *self.capsys.readouterr()

    def logs(self):
        return sorted(str(path.relative_to(self.out)) for path in self.out.glob("*/*"))


@pytest.fixture
def racing(tmp_path, monkeypatch, capsys):
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield Race(tmp_path, monkeypatch, capsys)
    for sign, handler in before.items():
        signal.signal(sign, handler)


def test_versions_run_in_turn_with_the_rounds_seed_and_are_compared_with_the_first(racing):
    code, calls, out, err = racing.run(racing.a, racing.b, f"{racing.a} WIDTH=2", "-n", 2)
    assert code == 0 and calls == ["a 1 1", "b 1 1", "a 2 1", "a 1 2", "b 1 2", "a 2 2"], err
    assert racing.logs() == [f"{label}/round-0{r}.txt" for label in ("a", "a_WIDTH=2", "b") for r in (1, 2)]
    assert out.startswith(f"3 versions, 2 rounds: 6 runs to do, logs in {racing.out}\n")
    assert "b against a, paired over 2 rounds: " in out and "a_WIDTH=2 against a, paired over 2 " in out
    assert not list(racing.folder.glob("race-*"))
    head = (racing.out / "a_WIDTH=2/round-02.txt").read_text().partition("\n")[0]
    source = racing.out / head.split()[1].removeprefix("../")
    assert source.read_text() == Path(racing.a).read_text() and len(list(racing.out.glob("*.py"))) == 2


def test_a_small_race_says_how_far_it_can_be_trusted(racing, monkeypatch):
    assert race.SMALL_RACE not in racing.run(racing.a, racing.b, "-n", 1)[2]
    monkeypatch.setenv("PRESET", "proxy")
    assert racing.run(racing.a, racing.b, "-n", 2)[2].endswith(f"\n{race.SMALL_RACE}\n")


def test_the_same_command_continues_a_race_and_a_larger_n_adds_rounds(racing):
    racing.run(racing.a, racing.b, "-n", 2)
    assert racing.run(racing.a, racing.b, "-n", 2)[:2] == (0, [])
    (racing.out / "a/round-02.txt").unlink()
    about = racing.out / "race.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"times_compare": False}))
    assert racing.run(racing.a, racing.b, "-n", 3)[:2] == (0, ["a 1 2", "a 1 3", "b 1 3"])
    assert json.loads(about.read_text())["times_compare"] is False


def test_a_versions_seed_holds_in_all_rounds_and_one_in_the_environment_in_none(racing, monkeypatch):
    monkeypatch.setenv("SEED", "4")
    assert racing.run(racing.a, f"{racing.b} SEED=9", "-n", 1)[:2] == (0, ["a 1 1", "b 1 9"])


def test_a_run_has_the_processes_that_its_plan_names(racing, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    assert racing.run(racing.a, "-n", 1)[:2] == (0, ["a 1 1", "a 1 1"])


def test_a_failing_run_is_told_with_what_it_printed_and_the_others_run(racing, monkeypatch):
    monkeypatch.setenv("FAIL", "b 2")
    code, calls, out, err = racing.run(racing.a, racing.b, "-n", 3)
    everything = ["a 1 1", "b 1 1", "a 1 2", "b 1 2", "a 1 3", "b 1 3"]
    assert code == 1 and calls == everything, "one that diverges does not keep the others from running"
    assert racing.logs() == [f"{x[0]}/round-0{x[-1]}.txt" for x in sorted(everything) if x != "b 1 2"]
    assert err.startswith("1 of 6 runs failed; the same command tries them again:\nround 2, b: exit code 1, ")
    assert "the loss is not finite" in err and "round 2, b: exit code 1" in out
    monkeypatch.delenv("FAIL")
    assert racing.run(racing.a, racing.b, "-n", 3)[:2] == (0, ["b 1 2"])


def test_a_race_needs_no_console(racing, monkeypatch):
    """Here one whose disk is full. It is told once."""
    full = open("/dev/full", "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        code, calls, _, err = racing.run(racing.a, racing.b, "-n", 2)
    full.close()  # raises OSError if anything waits to be written there
    assert code == 0 and len(calls) == len(racing.logs()) == 4
    assert err.startswith("cannot print on (") and err.count("\n") == 1


def test_names_are_read_as_they_are_in_any_encoding_of_the_console(racing, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    assert racing.run(f"{racing.a} WIDTH=é", "-n", 1)[:2] == (0, ["a é 1"])
    assert racing.run(f"{racing.a} WIDTH=é", "-n", 1)[:2] == (0, [])


def test_a_log_that_is_not_complete_does_not_count(racing):
    cut = racing.script("a", extra="path.write_text(path.read_text()[:-60])\n")
    code, _, _, err = racing.run(cut, "-n", 1)
    assert code == 1 and racing.logs() == ["a/round-01.part"]
    assert "a/round-01.part: not the log of a complete run: " in err


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_race_leaves_only_whole_logs_and_continues(racing, sign):
    racing.calls.write_text("")
    arguments = [racing.a, racing.b, "-n", "2", "--out", racing.out]
    child = subprocess.Popen([sys.executable, ROOT / "records/race.py", *arguments], text=True,
                             env=environment(CALLS=racing.calls, HANG="a 2", TMPDIR=racing.folder),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while racing.calls.read_text().count("\n") < 3:
        assert child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, sign)  # as the terminal does
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130 and "the same command continues" in err
    assert racing.logs() == ["a/round-01.txt", "b/round-01.txt"] and not list(racing.folder.glob("race-*"))
    assert racing.run(racing.a, racing.b, "-n", 2)[:2] == (0, ["a 1 2", "b 1 2"])


def test_a_race_is_not_continued_with_other_versions(racing, monkeypatch):
    racing.run(racing.a, racing.b, "-n", 1)

    def refused(what, *versions):
        code, calls, _, err = racing.run(*versions, "-n", 1)
        assert code == 1 and not calls and what in err and err.count("\n") == 1

    refused("expected a race of ['b', 'a'], found ['a', 'b']; choose another --name.", racing.b, racing.a)
    refused("differ in width (1, 2): restore it", f"a:{racing.a} WIDTH=2", racing.b)
    refused("differ in seed (1, 7): restore it", f"a:{racing.a} SEED=7", racing.b)
    monkeypatch.setenv("TARGET_LOSS", "2")
    refused("differ in target_loss (1, 2): restore it", racing.a, racing.b)
    monkeypatch.delenv("TARGET_LOSS")
    refused("differ in source: restore it", racing.a, racing.script("b", extra="# edited\n"))
    log = racing.out / "a/round-01.txt"
    log.write_text(log.read_text()[:-50])
    refused("not the log of a complete run: ", racing.a, racing.b)


def test_a_race_is_not_continued_on_another_machine(racing, monkeypatch):
    racing.run(racing.a, racing.b, "-n", 1)
    monkeypatch.setattr(race, "describe_machine", lambda nproc: "64 CPUs, 32 threads")
    code, calls, _, err = racing.run(racing.a, racing.b, "-n", 2)
    assert code == 1 and not calls and err.count("\n") == 1 and "a/round-01.txt: expected a run on " in err
    assert "on this machine (64 CPUs, 32 threads), found one on 2 CPUs, 2 threads: continue" in err
    assert racing.run(racing.a, racing.b, "-n", 1)[:2] == (0, [])  # nothing to do but to report
    monkeypatch.setattr(race, "describe_machine", lambda nproc: "Python 3.12.1 (main)\n2 CPUs, 2 threads")
    code, calls, _, err = racing.run(racing.a, racing.b, "-n", 2)
    assert code == 1 and not calls and "expected a run with Python 3.12.1, found Python 3.11: " in err


def test_versions_that_take_other_data_or_lack_a_setting_are_no_race(racing, monkeypatch):
    versions = [race.Version(label, Path(racing.a), None, {}, settings=dict(val_tokens=tokens))
                for label, tokens in (("a", "32"), ("c", "64"))]
    with pytest.raises(report.ReportError, match=r"^c: expected the data of a \(val_tokens 32\), found 64; "):
        race.require_alike(versions)
    versions[1].overrides["VAL_TOKENS"] = "64"
    race.require_alike(versions)
    versions[1].settings["new_rate"] = "3"
    race.require_alike(versions)
    monkeypatch.setenv("NEW_RATE", "5")
    with pytest.raises(report.ReportError, match="^a: expected settings that all versions have, found NEW"):
        race.require_alike(versions)


def test_two_races_into_one_folder_do_not_mix(racing):
    racing.run(racing.a, racing.b, "-n", 1)
    with race.only_race(racing.out):
        code, calls, _, err = racing.run(racing.a, racing.b, "-n", 2)
    assert code == 1 and not calls and "expected one race at a time, found another that is running" in err
    assert racing.run(racing.a, racing.b, "-n", 2)[:2] == (0, ["a 1 2", "b 1 2"])


def test_nohup_keeps_a_race_from_hanging_up(racing):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    racing.run(racing.a, "-n", 1)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_versions_take_the_processes_and_threads_that_this_checkout_chooses(monkeypatch):
    for name in os.environ.keys() - environment().keys() | {"OMP_NUM_THREADS"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PRESET", "demo")
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("MICROBATCHES", "2")
    cores = len(os.sched_getaffinity(0))
    several = {"NPROC": "2", "OMP_NUM_THREADS": str(cores // 2)}
    processes_here.cache_clear()
    assert processes_here() == (several if cores > 1 else {"NPROC": "1"})
    monkeypatch.setenv("NPROC", "no number")
    processes_here.cache_clear()
    with pytest.raises(report.ReportError, match="cannot say how it would run here: .*NPROC: expected"):
        processes_here()


def test_this_machine_is_described_as_in_a_log(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    there = describe_machine(1)
    assert report.describe_hardware(there, "device: cpu") == f"{os.cpu_count()} CPUs, 1 threads"


@pytest.mark.parametrize("versions, what", [
    (["{a}", "{b} WIDTH=0"], "b_WIDTH=0 cannot run: WIDTH: expected at least 1, found 0."),
    (["{a}", "{b} WITH=2 width=3"], "b_WITH=2_width=3: expected names of settings, found WITH, width."),
    (["{a}", "{a}"], "expected different labels, found ['a', 'a']; put LABEL: in front of one."),
    (["{a} HEAD"], "expected [LABEL:][REVISION or SCRIPT][+FILE.patch ...] [NAME=VALUE ...]."),
    (["no-such-thing"], "'no-such-thing': expected a script, a git revision or NAME=VALUE"),
    (["'unclosed"], "expected [LABEL:][REVISION or SCRIPT][+FILE.patch ...] [NAME=VALUE ...]."),
    (["{a}+no-such.patch"], "expected a patch at no-such.patch, found no such file."),
    (["bad:{b}+{b}.patch"], "bad: {b}.patch does not apply: patch failed: train_gpt.py:1."),
    (["{a}+{a}"], "expected a script, a git revision or NAME=VALUE, found none of these."),
])
def test_what_cannot_run_is_said_before_anything_runs(racing, versions, what):
    racing.patch("b.py", "NAME, LOG, LOG_NAME = 'a'", "NAME, LOG, LOG_NAME = 'c'")  # only a.py has this line
    code, calls, _, err = racing.run(*(text.format(a=racing.a, b=racing.b) for text in versions))
    assert code == 1 and not calls and what.format(b=racing.b) in err and err.count("\n") == 1
    assert not racing.out.exists()


@pytest.mark.parametrize("text, label, overrides", [
    ("", "baseline", {}),
    ("SKIP_MLP= VALUE_EMBEDS=.12", "SKIP_MLP=_VALUE_EMBEDS=.12", {"SKIP_MLP": "", "VALUE_EMBEDS": ".12"}),
    ("none:SKIP_MLP=0", "none", {"SKIP_MLP": "0"}),
    ("wide:baseline MLP_DIM=512", "wide", {"MLP_DIM": "512"}),
])
def test_overrides_of_this_checkouts_script_are_a_version(text, label, overrides):
    version = race.read_version(text)
    assert (version.label, version.overrides, version.script) == (label, overrides, ROOT / "train_gpt.py")


def test_a_revision_runs_in_a_worktree_that_is_removed_and_the_working_tree_in_a_copy(racing, monkeypatch):
    repository = racing.folder / "repository"
    repository.mkdir()
    monkeypatch.setattr(race, "ROOT", repository)

    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                              cwd=repository, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (repository / "train_gpt.py").write_text(open(racing.a).read())
    git("add", ".")
    git("commit", "-q", "-m", "first")
    # the first run edits the working tree, of which a copy was taken
    edit = f"Path({str(repository / 'train_gpt.py')!r}).write_text('broken')\n"
    (repository / "train_gpt.py").write_text(open(racing.b).read() + edit)
    named = racing.patch("named", "NAME, LOG, LOG_NAME = 'a'", "NAME, LOG, LOG_NAME = 'c'")
    code, calls, _, err = racing.run("old:HEAD WIDTH=3", "", f"HEAD+{named}", "-n", 2)
    assert code == 0 and calls == ["a 3 1", "b 1 1", "c 1 1", "a 3 2", "b 1 2", "c 1 2"], err
    assert git("worktree", "list").count("\n") == 1
    kept = json.loads((racing.out / "race.json").read_text())["versions"]
    assert kept[0] == dict(label="old", commit=git("rev-parse", "HEAD").strip(), overrides={"WIDTH": "3"})
    assert kept[2] == dict(label="HEAD+named", commit=kept[0]["commit"], overrides={}, base=kept[0]["commit"],
                           patches=["../named.patch"])
    assert report.read_log(racing.out / "old/round-01.txt").source == open(racing.a).read().rstrip()


def test_a_patch_of_this_checkouts_script_is_a_version(racing, monkeypatch):
    """Also where a race's folders lie in a git repository, which git would take for that of the script."""
    monkeypatch.setattr(race, "ROOT", racing.folder)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], cwd=racing.folder, check=True)
    (racing.folder / "train_gpt.py").write_text(Path(racing.a).read_text())
    subprocess.run([*git, "add", "train_gpt.py"], cwd=racing.folder, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], cwd=racing.folder, check=True)
    named = racing.patch("named", "NAME, LOG, LOG_NAME = 'a'", "NAME, LOG, LOG_NAME = 'c'")
    code, calls, _, err = racing.run("", f"idea:+{named}", "-n", 1)
    assert code == 0 and calls == ["a 1 1", "c 1 1"], err
    kept = json.loads((racing.out / "race.json").read_text())["versions"]
    assert kept[1] == dict(label="idea", commit=None, overrides={}, base=race.git("rev-parse", "HEAD"),
                           patches=["../named.patch"])
    edited = racing.folder / "train_gpt.py"
    edited.write_text(edited.read_text() + "# edited\n")
    version = race.read_version(f"idea:+{named}")
    assert race.describe_version(version, racing.out)["base"] is None


def test_patches_change_a_script_one_after_the_other_and_race_json_names_them(racing):
    wide = racing.patch("wide", 'os.environ.get(name.upper(), "1")', 'os.environ.get(name.upper(), "5")')
    named = racing.patch("named", "NAME, LOG, LOG_NAME = 'a'", "NAME, LOG, LOG_NAME = 'c'")
    versions = racing.a, f"{racing.a}+{wide}", f"both:{racing.a}+{wide}+{named} WIDTH=7"
    code, calls, _, err = racing.run(*versions, "-n", 1)
    assert code == 0 and calls == ["a 1 1", "a 5 1", "c 7 1"], err
    kept = json.loads((racing.out / "race.json").read_text())["versions"]
    assert kept[0] == dict(label="a", commit=None, overrides={})
    assert kept[1] == dict(label="a+wide", commit=None, overrides={}, base=None, patches=["../wide.patch"])
    assert kept[2] == dict(label="both", commit=None, overrides={"WIDTH": "7"}, base=None,
                           patches=["../wide.patch", "../named.patch"])
    racing.patch("wide", 'os.environ.get(name.upper(), "1")', 'os.environ.get(name.upper(), "6")')
    code, calls, _, err = racing.run(*versions)
    assert code == 1 and not calls and "a+wide differ in target_loss (5, 6), width (5, 6), source: " in err


def test_a_race_by_name_is_found_again_on_another_day(tmp_path, monkeypatch):
    before = tmp_path / "records/2020-01-01_Gates/race.json"
    before.parent.mkdir(parents=True)
    before.write_text("")
    monkeypatch.setattr(race, "ROOT", tmp_path)
    assert race.out_folder("Gates") == before.parent
    assert race.out_folder("Other").parent == tmp_path / "records"
