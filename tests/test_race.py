"""race.py: versions, turns, seeds, resumption, failures, with a stand-in script; and a short real race."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment
from test_report import our_log, report

import race

# Logs its settings as train_gpt.py does, takes no time, and appends what it was asked to $CALLS.
STAND_IN = """
import os, sys, time
from pathlib import Path
value = {name: os.environ.get(name.upper(), "1") for name in ("seed", "width", "target_loss")}
if "--dry-run" in sys.argv:
    if value["width"] == "0":
        sys.exit("WIDTH: expected at least 1, found 0.")
    print("settings:", *(f"  {name}: {x}" for name, x in value.items()), sep="\\n")
    sys.exit()
print("step:1/4 train_time:1ms step_avg:1.00ms", flush=True)
with open(os.environ["CALLS"], "a") as calls:
    print(NAME, value["width"], value["seed"], file=calls)
if os.environ.get("FAIL") == f"{NAME} {value['seed']}":
    sys.exit("the loss is a whale")
if os.environ.get("HANG") == f"{NAME} {value['seed']}":
    time.sleep(60)
Path("logs").mkdir(exist_ok=True)
log = LOG.replace("seed: 0", "seed: " + value["seed"]).replace("print(1)\\n", Path(__file__).read_text())
Path("logs/log.txt").write_text(log)
"""


class Race:
    """Two stand-in scripts, a.py and b.py, and the folder of their race."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out, self.calls = folder, folder / "out", folder / "calls"
        for name in environment().keys() ^ os.environ.keys():
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CALLS", str(self.calls))
        self.a, self.b = (self.script(name) for name in "ab")

    def script(self, name, extra=""):
        path = self.folder / f"{name}.py"
        log = our_log((5, 3, 1.6 if name == "a" else 1.5))
        path.write_text(f"NAME, LOG = {name!r}, {log!r}\n{STAND_IN}{extra}")
        return str(path)

    def run(self, *arguments):
        """Exit code, and the calls that were made, as 'NAME WIDTH SEED'."""
        self.calls.write_text("")
        code = race.main([*map(str, arguments), "--out", str(self.out)], [sys.executable, "train_gpt.py"])
        return code, self.calls.read_text().splitlines()

    def logs(self):
        return sorted(str(path.relative_to(self.out)) for path in self.out.glob("*/*"))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield Race(tmp_path, monkeypatch)
    for sign, handler in before.items():
        signal.signal(sign, handler)


def test_versions_run_in_turn_with_the_rounds_seed_and_are_reported_against_the_first(stand_in, capsys):
    code, calls = stand_in.run(stand_in.a, stand_in.b, f"{stand_in.a} WIDTH=2", "-n", 2)
    assert code == 0 and calls == ["a 1 1", "b 1 1", "a 2 1", "a 1 2", "b 1 2", "a 2 2"]
    assert stand_in.logs() == [f"{label}/round-0{r}.txt" for label in ("a", "a_WIDTH=2", "b") for r in (1, 2)]
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err and lines[0] == f"3 versions, 2 rounds: 6 runs to do, logs in {stand_in.out}"
    assert lines[1].startswith("run 1 of 6: round 1, a: loss 1.6000 at step 4/4, 0.4 s of training, ")
    assert [line.split(" left")[0][-3:] for line in lines[1:7]] == ["0 s"] * 6
    assert "b against a, paired over 2 rounds" in out and "a_WIDTH=2 against a, paired" in out


def test_a_race_that_was_stopped_goes_on_and_a_larger_n_adds_rounds(stand_in):
    versions = stand_in.a, stand_in.b
    stand_in.run(*versions, "-n", 2)
    assert stand_in.run(*versions, "-n", 2) == (0, [])
    (stand_in.out / "a/round-02.txt").unlink()
    assert stand_in.run(*versions, "-n", 3) == (0, ["a 1 2", "a 1 3", "b 1 3"])


def test_a_failing_run_stops_the_race_with_its_last_lines_and_the_rest_stays(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "b 2")
    code, calls = stand_in.run(stand_in.a, stand_in.b, "-n", 3)
    assert code == 1 and calls == ["a 1 1", "b 1 1", "a 1 2", "b 1 2"]
    assert stand_in.logs() == ["a/round-01.txt", "a/round-02.txt", "b/round-01.txt"]
    err = capsys.readouterr().err
    assert "the loss is a whale" in err
    assert err.splitlines()[-1] == (
        f"race.py: run 4 of 6: round 2, b ended with exit code 1; the runs before it "
        f"are kept in {stand_in.out}."
    )
    monkeypatch.delenv("FAIL")
    assert stand_in.run(stand_in.a, stand_in.b, "-n", 3) == (0, ["b 1 2", "a 1 3", "b 1 3"])


def test_a_log_that_is_not_whole_stops_the_race(stand_in, capsys):
    cut = stand_in.script("a", extra="Path('logs/log.txt').write_text(log[:-60])\n")
    assert stand_in.run(cut, "-n", 1)[0] == 1 and not stand_in.logs()
    assert "a ended without a whole log: " in capsys.readouterr().err


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_the_run_and_counts_no_half_log(stand_in, sign):
    stand_in.calls.write_text("")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import race; "
        "sys.exit(race.main(sys.argv[1:], [sys.executable, 'train_gpt.py']))"
    )
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            ROOT / "records",
            stand_in.a,
            stand_in.b,
            "-n",
            "2",
            "--out",
            stand_in.out,
        ],
        env=environment(CALLS=stand_in.calls, HANG="a 2", TMPDIR=stand_in.folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while stand_in.calls.read_text().count("\n") < 3:
        assert child.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    child.send_signal(sign)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130 and time.monotonic() - began < 15
    assert err == (
        f"\nrace.py: stopped; the finished runs are kept in {stand_in.out}, and the same command goes on.\n"
    )
    assert stand_in.logs() == ["a/round-01.txt", "b/round-01.txt"]
    assert not list(stand_in.folder.glob("race-*"))
    assert stand_in.run(stand_in.a, stand_in.b, "-n", 2) == (0, ["a 1 2", "b 1 2"])


def test_another_race_is_refused_in_the_same_folder(stand_in, monkeypatch, capsys):
    stand_in.run(stand_in.a, stand_in.b, "-n", 1)
    capsys.readouterr()

    def refused(what, *arguments):
        assert stand_in.run(*arguments) == (1, [])
        err = capsys.readouterr().err
        assert what in err and err.count("\n") == 1

    refused("holds a race of 'a' 'b'; name another --out", stand_in.b, stand_in.a)
    refused("holds a race with SEED=0 + round, not SEED=7 + round", stand_in.a, stand_in.b, "--seed", 7)
    refused("a is not what", f"a:{stand_in.a} WIDTH=2", stand_in.b)
    monkeypatch.setenv("TARGET_LOSS", "2")
    refused("its target_loss was 1, is 2; restore it", stand_in.a, stand_in.b)
    monkeypatch.delenv("TARGET_LOSS")
    stand_in.script("b", extra="# edited\n")
    refused("b is not what", stand_in.a, stand_in.b)
    (stand_in.out / "race.json").write_text("{")
    refused("race.json is damaged", stand_in.a, stand_in.b)


def test_one_race_at_a_time_in_a_folder(stand_in, capsys):
    version = race.read_version(stand_in.a)
    with race.open_race(stand_in.out, [version], "seeds"):
        with pytest.raises(race.RaceError, match="another race.py is at work in"):
            race.open_race(stand_in.out, [version], "seeds")


def test_a_log_that_was_hurt_or_is_of_another_source_is_not_counted(stand_in, capsys):
    stand_in.run(stand_in.a, "-n", 1)
    log = stand_in.out / "a/round-01.txt"
    text = log.read_text()
    for hurt, what in ((text[:-50], "cut"), (text.replace("NAME", "NAMES"), "holds another source than a's")):
        log.write_text(hurt)
        capsys.readouterr()
        assert stand_in.run(stand_in.a, "-n", 2) == (1, [])
        assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, label, overrides",
    [
        ("", "baseline", {}),
        ("baseline", "baseline", {}),
        ("SKIP_MLP=0,11", "SKIP_MLP=0,11", {"SKIP_MLP": "0,11"}),
        ("SKIP_MLP= VALUE_EMBEDS=.12", "SKIP_MLP=_VALUE_EMBEDS=.12", {"SKIP_MLP": "", "VALUE_EMBEDS": ".12"}),
        ("no mlp:SKIP_MLP=0", None, None),
        ("none:SKIP_MLP=0", "none", {"SKIP_MLP": "0"}),
        ("plain:", "plain", {}),
        ("wide:baseline MLP_DIM=512", "wide", {"MLP_DIM": "512"}),
        ("MLP_DIM=512 wide", None, None),
        ("no-such-thing", None, None),
        ("'unclosed", None, None),
    ],
)
def test_a_version_is_read_from_what_is_typed(text, label, overrides):
    if label is None:
        with pytest.raises(race.RaceError) as error:
            race.read_version(text)
        assert error.value.exit_code == 2 and "\n" not in str(error.value)
        return
    version = race.read_version(text)
    assert (version.label, version.overrides, version.commit) == (label, overrides, "")
    assert version.source == (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_a_git_revision_is_its_script_at_that_commit(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    for source in ("old\n", "new\n"):
        (tmp_path / "train_gpt.py").write_text(source)
        git("add", ".")
        git("commit", "-q", "-m", source)
    monkeypatch.setattr(race, "ROOT", tmp_path)
    old, new = race.read_version("HEAD~1 SEED=3"), race.read_version("now:HEAD")
    assert (old.source, old.label, old.overrides, len(old.commit)) == (
        "old\n",
        "HEAD_1_SEED=3",
        {"SEED": "3"},
        40,
    )
    assert (new.source, new.label, new.overrides) == ("new\n", "now", {})
    (tmp_path / "train_gpt.py").write_text("edited\n")
    assert race.read_version("").source == "edited\n" and race.read_version("HEAD").source == "new\n"


def test_what_cannot_run_is_said_before_the_race(stand_in, capsys):
    for versions, what in (
        ((stand_in.a, f"{stand_in.b} WIDTH=0"), "WIDTH: expected at least 1, found 0."),
        ((stand_in.a, f"{stand_in.b} WITH=2"), "WITH is no setting to race with."),
        ((stand_in.a, f"{stand_in.b} LOG_DIR=2"), "LOG_DIR is no setting to race with."),
        ((stand_in.a, stand_in.a), "two versions are called 'a'; put LABEL: in front"),
    ):
        code, calls = stand_in.run(*versions)
        err = capsys.readouterr().err
        assert code in (1, 2) and not calls and what in err and err.count("\n") == 1
        assert not stand_in.out.exists()


def test_seed_from_the_environment_or_a_version_holds_in_all_rounds(stand_in, monkeypatch):
    assert stand_in.run(stand_in.a, f"{stand_in.b} SEED=9", "-n", 2)[1] == [
        "a 1 1",
        "b 1 9",
        "a 1 2",
        "b 1 9",
    ]
    stand_in.out = stand_in.folder / "other"
    monkeypatch.setenv("SEED", "4")
    assert stand_in.run(stand_in.a, "-n", 2)[1] == ["a 1 4", "a 1 4"]


def test_a_race_by_name_lies_in_records_and_is_found_again_on_another_day(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "ROOT", tmp_path)
    args = race.parse_arguments(["x", "--name", "Gates"])
    assert race.out_folder(args).parent == tmp_path / "records" and race.out_folder(args).name.endswith(
        "_Gates"
    )
    before = tmp_path / "records/2020-01-01_Gates/race.json"
    before.parent.mkdir(parents=True)
    before.write_text("")
    assert race.out_folder(args) == before.parent


def test_time_left_goes_by_each_versions_own_runs():
    versions = [race.Version(label, "", "", "", {}) for label in "ab"]
    progress = race.Progress([(r, v) for r in (1, 2) for v in versions], 0)
    assert progress.left(0) == "time left not known yet"
    progress.walls = {"a": [10.0], "b": [60.0, 80.0]}
    assert (
        progress.left(2) == "80 s left"
        and progress.left(0) == "3 min left"
        and progress.left(3, 30) == "40 s left"
    )


@pytest.mark.slow
def test_a_short_race_of_the_real_script(tmp_path):
    short = dict(
        PRESET="demo",
        NUM_ITERATIONS=2,
        VAL_LOSS_EVERY=1,
        MODEL_DIM=32,
        MLP_DIM=64,
        BATCH_TOKENS=1280,
        VAL_TOKENS=8192,
        WARMUP_STEPS=0,
        TARGET_LOSS=0,
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "records/race.py"), "", "SKIP_MLP=0,11", "-n", "1", "--out", "race"],
        cwd=tmp_path,
        env=environment(**short),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "verdict: " in done.stdout and not done.stderr
    groups = report.load([tmp_path / "race"])
    assert [group.label for group in groups] == ["baseline", "SKIP_MLP=0,11"]
    runs = [group.runs[0] for group in groups]
    assert runs[0].source == runs[1].source == (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    assert [run.settings["skip_mlp"] for run in runs] == ["'0'", "'0,11'"]
    assert all(
        run.settings["seed"] == "1" and run.last.val_loss < run.validations[0].val_loss for run in runs
    )
    for path in (tmp_path / "race").glob("*/*"):  # no log names a place of this machine
        assert str(ROOT) not in path.read_text().partition("=" * 100)[2] and "race-" not in path.read_text()
    kept = json.loads((tmp_path / "race/race.json").read_text())
    assert [version["label"] for version in kept["versions"]] == ["baseline", "SKIP_MLP=0,11"]
