"""report.py: logs good, cut, damaged and foreign; groups that must not mix; statistics; tables and files."""

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from scipy import stats

sys.path.insert(0, str(ROOT / "records"))

import report  # noqa: E402
from report import Difference, ReportError, compare, difference, load, read_log  # noqa: E402

RULE = "=" * 100
SMI = """| NVIDIA-SMI 550.144.03             Driver Version: 550.144.03     CUDA Version: 12.4     |
|=========================================+========================+======================|
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |                    0 |
|   1  NVIDIA H100 80GB HBM3          On  |   00000000:62:00.0 Off |                    0 |"""


def our_log(
    losses=(5.0, 3.0, 1.6), ms=100.0, source="print(1)\n", target=1.7, every=2, total=None, **settings
):
    """A log of ours: a validation every `every` steps, `ms` a step."""
    steps = every * (len(losses) - 1)
    total = total or steps
    settings = {"seed": 0, "num_iterations": total, "target_loss": target, "log_dir": "'logs'"} | settings
    lines = [source, RULE, "Python 3.11", "platform: Linux, 2 CPUs, 2 threads", "git commit: none", RULE]
    lines += [f"{name}: {value}{'  (overridden)' * (name == 'seed')}" for name, value in settings.items()]
    lines += [RULE, "device: cpu, no CUDA GPU is here", "batch: 1 rank x 8 microbatches"]
    for step in range(steps + 1):
        if step:
            lines.append(
                f"step:{step}/{total} train_time:{ms * step:.0f}ms step_avg:{ms:.2f}ms train_loss:4.0"
            )
        if step % every == 0:
            times = f"train_time:{ms * step:.0f}ms step_avg:{ms:.2f}ms"
            lines.append(f"step:{step}/{total} val_loss:{losses[step // every]:.4f} {times}")
    lines.append(
        f"target_reached:{int(losses[-1] <= target)} target_loss:{target:g} val_loss:{losses[-1]:.4f} "
        f"final_step:{steps} {times}"
    )
    return "\n".join([*lines, "peak memory allocated: 7 MiB reserved: 9 MiB", ""])


def published_log(loss=3.2789, steps=10, ms=95.6):
    lines = ["import torch", 'print("step:0/1 val_loss:x")', RULE, "Running Python 3.12", SMI, RULE]
    for step in range(steps + 1):
        times = f"train_time:{ms * step:.0f}ms step_avg:{ms:.2f}ms"
        lines += [f"step:{step}/{steps} {times}"] * (step > 0)
        lines += [f"step:{step}/{steps} val_loss:{loss + 4 * (steps - step):.4f} {times}"] * (step % 5 == 0)
    return "\n".join([*lines, "peak memory allocated: 34489 MiB reserved: 48516 MiB", ""])


def write(folder, *texts, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"{i}.txt" for i in range(len(texts))]
    for name, text in zip(names, texts):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def raced(folder, **versions):
    """A race's folder: version -> log texts by round."""
    for label, texts in versions.items():
        write(folder / label, *texts, names=[f"round-{i:02}.txt" for i in range(1, len(texts) + 1)])
    labels = ", ".join(f'{{"label": "{label}"}}' for label in versions)
    (folder / "race.json").write_text(f'{{"versions": [{labels}]}}')
    return folder


def run(capsys, *arguments):
    code = report.main([str(x) for x in arguments])
    return code, *capsys.readouterr()


def test_our_log_is_read_as_it_stands(tmp_path):
    log = read_log(write(tmp_path, our_log(source="a = 1\n\nb = 2\n", seed=3)) / "0.txt")
    assert log.source == "a = 1\n\nb = 2\n" and log.settings["seed"] == "3" and log.overridden == {"seed"}
    assert (log.last.val_loss, log.last.step, log.num_steps, log.seconds) == (1.6, 4, 4, 0.4)
    assert (log.step_avg, log.peak, log.target, log.hardware) == (100.0, 7, 1.7, "2 CPUs, 2 threads")
    assert [p.step for p in log.validations] == [0, 2, 4] and len(log.points) == 7
    assert log.reached(3.5).step == 2 and log.reached(1.0) is None


def test_a_log_of_the_published_speedrun_is_read_as_it_stands(tmp_path):
    log = read_log(write(tmp_path, published_log()) / "0.txt")
    assert log.source.startswith("import torch") and not log.settings and log.target == 3.28
    assert (log.last.val_loss, log.last.step, log.seconds, log.peak) == (3.2789, 10, 0.956, 34489)
    assert log.hardware == "2 x NVIDIA H100 80GB HBM3"


def test_the_logs_of_the_repository_are_read():
    (group,) = load([ROOT / "records/2026-11-23_Demo"])
    assert len(group.runs) == 3 and not group.left_out
    assert {run.target for run in group.runs} == {1.7}


GOOD = our_log()
HURT = {
    "part of a run: stopped by SIGTERM": GOOD[: GOOD.index("step:3/4 ")] + "stopped by SIGTERM after step 2",
    "part of a run: ended by UserError: x": GOOD[: GOOD.index("step:3/4 ")] + "ended by UserError: x",
    "part of a run: resumed: x, step 2": GOOD.replace("step:0/4 val", "resumed: x, step 2\nstep:0/4 val"),
    "cut: it ends at step 3": GOOD[: GOOD.index("step:4/4 train")],
    "cut: it ends at step 2": GOOD[: GOOD.index("step:3/4 train") + 12],
    "cut: it ends before step 0": GOOD[: GOOD.index("step:0")],
    "cut: it ends at step 4, without": re.sub("peak.*\n", "", GOOD),
    "cut: it ends at step 5 of 10": published_log()[: published_log().index("step:6/")] + "peak memory "
    "allocated: 1 MiB reserved: 1 MiB\n",
    "step 4 follows step 2": re.sub(r"step:3/4 .*\n", "", GOOD),
    "follows step 2 at": GOOD.replace("train_time:300ms", "train_time:30ms"),
    "no whole step line": GOOD.replace("step:3/4 train_time:300ms", "step:3/4 train_time:3@0ms"),
    "no whole step line: 'step:4/4 val_loss:nan": GOOD.replace(
        "step:4/4 val_loss:1.6000", "step:4/4 val_loss:nan"
    ),
    "in a run of 4 steps": GOOD.replace("step:3/4 ", "step:3/9 "),
    "its final line does not fit": GOOD.replace("target_reached:1", "target_reached:0"),
    "final line does not fit": GOOD.replace("1.6000 final_step", "1.5000 final_step"),
    "final line does not fit its settings and its": GOOD.replace("train_time:400ms step_avg:100.00ms\npeak",
                                                                 "train_time:399ms step_avg:100.00ms\npeak"),
    "900 ms for 4 steps do not make an average of 100.00 ms": GOOD.replace("time:400ms", "time:900ms"),
    "the validation at step 2 is not there": re.sub("\nstep:2/4 val.*", "", GOOD).replace(
        "seed: 0", "val_loss_every: 2\nseed: 0"),
    "its settings say 9 steps, its lines 4": GOOD.replace("num_iterations: 4", "num_iterations: 9"),
    "does not fit its settings": GOOD.replace("target_loss: 1.7", "target_loss: 1.8"),
    "among the settings": GOOD.replace("seed: 0", "seed 0"),
    "the lines of one run": GOOD + "peak memory allocated: 7 MiB reserved: 9 MiB\n",
    "step 0 at 0 ms follows": GOOD.partition("peak")[0] + GOOD[GOOD.index("step:0") :],
    "is zero": GOOD.replace("Python", "Py\0hon"),
    "no log of a run": "shopping list\n",
}


@pytest.mark.parametrize("what", HURT)
def test_a_hurt_log_is_named_with_what_ails_it(tmp_path, what):
    folder = write(tmp_path, HURT[what])
    with pytest.raises(ReportError, match=re.escape(what)) as error:
        read_log(folder / "0.txt")
    assert str(error.value).startswith(f"{folder / '0.txt'}: ") and "\n" not in str(error.value)


def test_logs_that_do_not_read_are_named_and_left_out_and_the_rest_counts(tmp_path, capsys):
    folder = write(tmp_path, our_log(), our_log()[:-60], our_log((5, 3, 1.5)))
    (folder / "3.txt").write_bytes(b"\xff\xfe")
    code, out, err = run(capsys, folder, folder / "none.txt")
    assert code == 0 and not err and "n 2; loss 1.5500" in out
    assert "1.txt: cut" in out and "3.txt: damaged" in out and f"{folder / 'none.txt'}: missing" in out
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, tmp_path / "empty")
    assert code == 1 and "no logs in this folder" in out and err == "report.py: found no complete log.\n"


@pytest.mark.parametrize(
    "other, what",
    [
        (our_log(source="print(2)\n"), "source"),
        (our_log(mlp_dim=5), "mlp_dim (none, 5)"),
        (our_log(target=1.8), "target_loss (1.7, 1.8)"),
        (published_log(), "source"),
    ],
)
def test_logs_of_different_source_or_settings_do_not_mix_unless_told_to(tmp_path, capsys, other, what):
    folder = write(tmp_path, our_log(), other)
    code, out, err = run(capsys, folder)
    assert (
        code == 1 and not out and what in err and "0.txt" in err and "1.txt" in err and err.count("\n") == 1
    )
    assert run(capsys, folder, "--mixed")[0] == 0


def test_seed_and_places_may_differ(tmp_path, capsys):
    folder = write(tmp_path, our_log(seed=1), our_log(seed=2, log_dir="'x'"))
    assert run(capsys, folder)[0] == 0
    assert run(capsys, folder / "0.txt", folder / "1.txt")[0] == 0


LOSSES = [3.278, 3.2795, 3.281, 3.2774, 3.2788]
OLD = [3.2791, 3.2801, 3.2802, 3.2789, 3.2797]


def test_the_statistics_are_scipys():
    assert report.p_at_most(LOSSES, 3.28) == pytest.approx(
        stats.ttest_1samp(LOSSES, 3.28, alternative="less").pvalue
    )
    assert report.p_at_most(LOSSES, 3.28) < 0.5 < report.p_at_most(LOSSES, 3.27)
    assert report.sd([1, 2, 4]) == pytest.approx(1.527525)
    for old, paired, test in (
        (OLD, True, stats.ttest_rel(LOSSES, OLD)),
        (OLD, False, stats.ttest_ind(LOSSES, OLD, equal_var=False)),
        (OLD[:3], False, stats.ttest_ind(LOSSES, OLD[:3], equal_var=False)),
    ):
        found, interval = difference(LOSSES, old, paired), test.confidence_interval(0.95)
        assert found.mean - found.half == pytest.approx(interval.low)
        assert found.mean + found.half == pytest.approx(interval.high)
        assert found.pairs == (5 if paired else 0) and not found.exact


def test_by_hand():  # differences -1, -2, -3: mean -2, sd 1, t(0.975, 2) = 4.3027
    found = difference([9.0, 8.0, 7.0], [10.0, 10.0, 10.0], paired=True)
    assert found.mean == -2 and found.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


@pytest.mark.parametrize(
    "new, old, paired, expected",
    [
        ([1.0], [3.0], True, Difference(-2.0, None, 1)),
        ([1.0], [3.0, 4.0], False, Difference(-2.5, None, 0)),
        ([1.1, 2.1], [1.1, 2.1], True, Difference(0.0, None, 2, True)),
        ([1.0, 2.0], [2.0, 3.0], True, Difference(-1.0, None, 2, True)),
        ([1.0, 1.0], [3.0, 3.0], False, Difference(-2.0, None, 0, True)),
    ],
)
def test_few_runs_and_no_spread_give_no_interval(new, old, paired, expected):
    assert difference(new, old, paired) == expected
    assert "nan" not in report.clause(expected, "time", "faster", "slower", 2, " s")


def test_no_p_without_spread_or_target():
    assert [report.p_at_most(x, 3.28) for x in ([3.2], [3.2, 3.2], [])] == [None] * 3
    assert report.p_at_most([3.1, 3.2], None) is None
    # one group without spread: Welch takes the other's
    found = difference([3.0, 3.0, 3.0], [1.0, 2.0, 3.0], False)
    assert found.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


@pytest.mark.parametrize(
    "seconds, loss, expected",
    [
        ((-1.41, 0.09), (0.0003, 0.002), "faster by 1.41 ± 0.09 s; loss no worse (+0.0003 ± 0.0020)"),
        (
            (1.41, 0.09),
            (0.0003, 0.02),
            "slower by 1.41 ± 0.09 s; no difference in loss seen (+0.0003 ± 0.0200)",
        ),
        (
            (-1, 2),
            (0.003, 0.001),
            "no difference in time seen (-1.00 ± 2.00 s); loss worse by 0.0030 ± 0.0010",
        ),
        (
            (-1, None),
            (-0.03, 0.001),
            "too few runs to judge time (-1.00 s); loss better by 0.0300 ± 0.0010",
        ),
        (
            (-1, 0.5),
            (-0.004, 0.010),
            "faster by 1.00 ± 0.50 s; no difference in loss seen (-0.0040 ± 0.0100)",
        ),
        ((-1, 0.5), (-0.006, 0.010), "faster by 1.00 ± 0.50 s; loss no worse (-0.0060 ± 0.0100)"),
    ],
)
def test_the_verdict_says_what_the_intervals_bear(seconds, loss, expected):
    found = dict(seconds=Difference(*seconds, 5), loss=Difference(*loss, 5))
    assert report.verdict(found, margin=0.005) == expected


def test_equal_losses_in_every_round_are_called_the_same():
    found = dict(seconds=Difference(-1.0, 0.1, 5), loss=Difference(0.0, None, 5, True))
    assert report.verdict(found, 0.005).endswith("; loss the same, with no spread in the runs")


def test_a_race_is_paired_by_round_and_its_missing_rounds_are_named(tmp_path, capsys):
    b = [our_log((5, 3, x), ms) for x, ms in ((1.60, 100), (1.50, 110), (1.40, 120))]
    a = [our_log((5, 3, x), ms, mlp_dim=9) for x, ms in ((1.61, 90), (1.52, 101), (1.43, 109))]
    folder = raced(tmp_path / "race", old=b, new=a)
    old, new = load([folder])
    assert (old.label, new.label) == ("old", "new")  # the race's order, not the alphabet's
    found = compare(new, old)
    assert found["loss"] == pytest.approx(difference([1.61, 1.52, 1.43], [1.60, 1.50, 1.40], True))
    (folder / "new/round-02.txt").unlink()
    code, out, _ = run(capsys, folder)
    assert code == 0 and "new against old, paired over 2 rounds" in out
    assert f"left out: {folder / 'new/round-02.txt'}: missing" in out
    elsewhere = write(tmp_path / "elsewhere", *a)
    assert "unpaired (Welch)" in run(capsys, elsewhere, "--vs", folder / "old")[1]


def test_runs_that_do_not_reach_the_target_are_counted(tmp_path, capsys):
    folder = write(tmp_path, our_log((5, 3, 1.6)), our_log((5, 3, 1.75)))
    assert "target 1.7: reached by 1 of 2, at step 4; p" in run(capsys, folder)[1]
    assert "target 3: reached by 2 of 2, at step 2; p" in run(capsys, folder, "--target", 3)[1]
    no_target = write(tmp_path / "0", our_log(target=0.0))
    assert "reached" not in run(capsys, no_target)[1]


def test_versus_compares_left_with_right(tmp_path, capsys):
    new = write(tmp_path / "new", *(our_log((5, 3, x), 90) for x in (1.6, 1.61, 1.62)))
    old = write(tmp_path / "old", *(our_log((5, 3, x), 100) for x in (1.6, 1.61, 1.63)))
    out = run(capsys, new, "--vs", old)[1]
    assert "verdict: faster by 0.04 s, with no spread in the runs; no difference in loss seen" in out
    code, _, err = run(capsys, new, "--vs", raced(tmp_path / "race", a=[our_log()], b=[our_log()]))
    assert code == 1 and err == "report.py: --vs expects one group, found 2: name one folder.\n"


def test_csv_has_every_line_and_the_plot_is_a_picture(tmp_path, capsys):
    folder = write(tmp_path / "runs", our_log(), our_log((5, 3, 1.5)))
    code, *_ = run(capsys, folder, "--csv", tmp_path / "x.csv", "--plot", tmp_path / "x.png")
    rows = list(csv.DictReader(open(tmp_path / "x.csv")))
    assert code == 0 and len(rows) == 14
    assert rows[-1] == dict(
        group="runs", log="1.txt", seed="0", step="4", train_time_ms="400", train_loss="", val_loss="1.5"
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, folder, "--csv", tmp_path / "none/x.csv")
    assert code == 1 and err == f"report.py: {tmp_path / 'none/x.csv'}: No such file or directory\n"


def test_parsing_works_without_scipy_and_what_needs_it_says_so(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path, our_log(), our_log((5, 3, 1.5)))
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert len(load([folder])[0].runs) == 2
    code, _, err = run(capsys, folder)
    assert code == 1
    assert err == "report.py: needs scipy; run: python -m pip install -r records/requirements.txt\n"


@pytest.mark.parametrize("arguments", [[], ["--check"], ["x", "--leaderboard", "y"], ["x", "--nonsense"]])
def test_wrong_arguments_are_code_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2


MARKED = f"# Title\n\n{report.BEGIN}\n{report.END}\n\nafter\n"


@pytest.fixture
def records(tmp_path):
    """A folder of two records: one version, and a race of two."""
    write(tmp_path, MARKED, names=["README.md"])
    write(tmp_path / "2026-01-02_One", "# One | run\n", our_log(), names=["README.md", "a.txt"])
    race = raced(
        tmp_path / "2026-02-03_Two",
        base=[our_log(), our_log((5, 3, 1.5))],
        wide=[our_log(mlp_dim=9), our_log((5, 3, 1.5), mlp_dim=9)],
    )
    write(race, MARKED.replace("# Title", "# Title\n\nWhat: wider"), names=["README.md"])
    return tmp_path


def test_the_leaderboard_is_what_the_logs_give(records, capsys):
    assert run(capsys, "--leaderboard", records, "--check")[0] == 1
    assert run(capsys, "--leaderboard", records)[0] == 0
    text = (records / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 2026")]
    assert text.startswith("# Title") and text.endswith("\n\nafter\n")
    assert rows[0].startswith(
        "| 2026-02-03 | [wider](2026-02-03_Two): base | 2 CPUs, 2 threads | 2 | 1.5500 ±"
    )
    assert rows[1].startswith("| 2026-02-03 | [wider](2026-02-03_Two): wide |")
    assert rows[2] == (
        "| 2026-01-02 | [One \\| run](2026-01-02_One) | 2 CPUs, 2 threads | 1 | 1.6000 | - (1.7) | "
        "1 of 1, at step 4 | 0.40 | 100.0 |"
    )
    own = (records / "2026-02-03_Two/README.md").read_text()
    assert "| wide | 2 |" in own and "time the same, with no spread in the runs; loss the same" in own
    assert run(capsys, "--leaderboard", records, "--check")[0] == 0


@pytest.mark.parametrize("page", ["README.md", "2026-02-03_Two/README.md"])
def test_a_table_touched_by_hand_fails_the_check(records, capsys, page):
    run(capsys, "--leaderboard", records)
    path = records / page
    path.write_text(path.read_text().replace("1.5500", "1.5400"))
    code, out, err = run(capsys, "--leaderboard", records, "--check")
    assert code == 1 and not out and err.startswith(f"{path}: its table is not what the logs give; run: ")


def test_a_record_with_a_damaged_log_fails(records, capsys):
    write(records / "2026-01-02_One", GOOD[:-50], names=["b.txt"])
    code, _, err = run(capsys, "--leaderboard", records)
    assert code == 1 and "b.txt: cut" in err
    shutil.rmtree(records / "2026-01-02_One")
    write(records, "no markers", names=["README.md"])
    assert "expected the lines" in run(capsys, "--leaderboard", records)[2]


def test_a_round_that_was_taken_away_fails(records, capsys):
    """Of all versions, or of one; all runs count."""
    race = records / "2026-02-03_Two"
    (race / "base/round-01.txt").unlink()
    code, _, err = run(capsys, "--leaderboard", records)
    assert code == 1 and err == f"{race / 'base/round-01.txt'}: missing\n"
    (race / "wide/round-01.txt").unlink()
    assert "round-01.txt: missing" in run(capsys, "--leaderboard", records)[2]


@pytest.mark.parametrize("version, said", [
    (dict(settings=dict(num_iterations="4")), None),
    (dict(sha256=hashlib.sha256(b"print(1)\n").hexdigest(), settings=dict(seed="7")), None),
    (dict(settings=dict(num_iterations="5")), "says: other num_iterations.\n"),
    (dict(sha256="0" * 64), "says: other source.\n"),
    (dict(label="wide"), "knows no version base.\n"),
])
def test_logs_that_are_not_those_of_the_races_versions_fail(records, capsys, version, said):
    race = records / "2026-02-03_Two" / "race.json"
    race.write_text(json.dumps(dict(versions=[dict(label="base") | version, dict(label="wide")])))
    code, _, err = run(capsys, "--leaderboard", records)
    assert (code, err) == (0, "") if said is None else code == 1 and err.endswith(said)


def test_no_run_counts_twice(tmp_path, capsys):
    folder = write(tmp_path / "runs", our_log(), our_log((5, 3, 1.5)))
    twice = f"report.py: {folder / '0.txt'} and {folder / '0.txt'} are the same run: name it once.\n"
    assert run(capsys, folder / "0.txt", folder / "0.txt") == (1, "", twice)
    shutil.copy(folder / "0.txt", folder / "2.txt")
    assert run(capsys, folder, "--mixed") == (1, "", twice.replace("and " + str(folder / "0"), "and " +
                                                                   str(folder / "2")))


def test_runs_of_other_hardware_are_compared_with_a_warning(tmp_path, capsys):
    old = write(tmp_path / "old", our_log(), our_log((5, 3, 1.5)))
    new = write(tmp_path / "new", *(our_log(losses).replace("2 threads", "1 threads")
                                    for losses in ((5, 3, 1.6), (5, 3, 1.5))))
    line = "their times do not compare: 2 CPUs, 1 threads against 2 CPUs, 2 threads"
    assert line in run(capsys, new, "--vs", old)[1] and line not in run(capsys, old, "--vs", old)[1]


def test_the_tables_of_this_repository_are_what_their_logs_give():
    done = subprocess.run(
        [sys.executable, "records/report.py", "--leaderboard", "--check"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
