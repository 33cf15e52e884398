"""report.py: logs good and bad, sets that must not mix, what the statistics say, plots and tables."""

import hashlib
import io
import json
import math
import re
import statistics
import sys
from functools import partial

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))

import compact  # noqa: E402
import report  # noqa: E402

RULE = "=" * 100
SMI = """|   0  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |                    0 |
|   1  NVIDIA H100 80GB HBM3          On  |   00000000:62:00.0 Off |                    0 |"""


def our_log(loss=1.6, ms=100.0, source="print(1)\n", target=1.7, steps=4, **settings):
    """A log of ours: 4 steps of `ms` each, validations at steps 0, 2 and 4, whose losses fall by 2."""
    settings = {"seed": 0, "target_loss": target, "log_dir": "'logs'"} | settings
    lines = [source, RULE, "Python 3.11", "platform: Linux, 2 CPUs, 2 threads", RULE]
    lines += [f"{name}: {value}{'  (overridden)' * (name == 'seed')}" for name, value in settings.items()]
    lines += [RULE, "device: cpu, no CUDA GPU is here", "batch: 1 rank x 8 microbatches"]
    for step in range(5):
        times = f"train_time:{ms * step:.0f}ms step_avg:{ms:.2f}ms"
        lines += [f"step:{step}/{steps} {times} train_loss:4.0"] * (step > 0)
        lines += [f"step:{step}/{steps} val_loss:{loss + 4 - step:.4f} {times}"] * (step % 2 == 0)
    reached = f"target_reached:{int(loss <= target)} target_loss:{target}"
    lines.append(f"{reached} val_loss:{loss:.4f} final_step:4 {times}")
    return "\n".join([*lines, "peak memory allocated: 7 MiB reserved: 9 MiB", ""])


def published_log(loss=3.2789, ms=956.0):
    """A log in the format of the published speedrun: no settings, no training losses; `ms` for 2 steps."""
    lines = ["import torch", 'print("step:0/1 val_loss:x")', RULE, "Running Python 3.12", SMI, RULE,
             "step:0/2 val_loss:10.8258 train_time:0ms step_avg:0.02ms",
             f"step:1/2 train_time:{ms / 2:.0f}ms step_avg:{ms / 2:.2f}ms",
             f"step:2/2 train_time:{ms:.0f}ms step_avg:{ms / 2:.2f}ms",
             f"step:2/2 val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / 2:.2f}ms"]
    return "\n".join([*lines, "peak memory allocated: 34489 MiB reserved: 48516 MiB", ""])


def write(folder, *texts, name="round-{:02}.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts, 1):
        (folder / name.format(number)).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run(capsys):
    """A function that runs report.py: (exit code, stdout, stderr)."""
    return lambda *arguments: (report.main([str(x) for x in arguments]), *capsys.readouterr())


def test_a_log_of_ours_is_read_as_it_stands(tmp_path):
    log = report.read_log(write(tmp_path, our_log(source="a = 1\n\nb = 2\n", seed=3)) / "round-01.txt")
    assert log.source == "a = 1\n\nb = 2" and log.settings["seed"] == "3"
    assert log.end == report.Validation(step=4, loss=1.6, seconds=0.4) and log.target == 1.7
    assert list(log.validations) == [0, 2, 4] and log.hardware == "2 CPUs, 2 threads"


def test_a_compact_log_says_what_it_said_before(tmp_path, capsys):
    """One file holds the source of all logs that had it; compacting again changes nothing."""
    sources = "a = 1\n\nb = 2\n", "c = 3\n"
    for label, source in zip("abc", (*sources, sources[0])):
        write(tmp_path / label, our_log(source=source), our_log(1.5, source=source))
    write(tmp_path / "d", published_log())
    write(tmp_path, "shopping list\n", name="note.txt")
    logs = sorted(tmp_path.glob("*/*.txt"))
    before = [report.read_log(log) for log in logs]
    assert compact.main([str(tmp_path)]) == 0
    assert [report.read_log(log) for log in logs] == before
    files = [file.read_text() for file in tmp_path.glob("train_gpt-*.py")]
    assert len(files) == 3 and set(sources) < set(files)
    digest = hashlib.sha256(sources[1].encode()).hexdigest()
    text = (tmp_path / "b/round-01.txt").read_text()
    assert text.startswith(f"source: ../train_gpt-{digest[:8]}.py sha256:{digest}\n{RULE}\nPython 3.11\n")
    assert compact.main([str(tmp_path)]) == 0 and (tmp_path / "b/round-01.txt").read_text() == text
    assert capsys.readouterr() == ("", "")
    assert compact.main([str(tmp_path / "none")]) == 1 and capsys.readouterr().err.count("\n") == 1


def test_a_compact_log_needs_its_source(tmp_path, run):
    log = write(tmp_path, our_log()) / "round-01.txt"
    compact.compact(log, tmp_path)
    [file] = tmp_path.glob("train_gpt-*.py")
    file.write_text("print(2)\n")
    code, out, err = run(tmp_path)
    assert code == 1 and not out and err.startswith(f"{log}: expected its source in {file}, with SHA-256 ")
    assert err.endswith("; restore that file.\n") and err.count("\n") == 1
    file.unlink()
    missing = f"{log}: expected its source in {file}, found no such file; put it there.\n"
    assert run(tmp_path) == (1, "", missing)


def test_the_published_speedruns_figures_come_out(tmp_path, run):
    # the published losses of pull request 120; times of the published mean and standard deviation
    new = [3.2806, 3.2764, 3.2787, 3.2778, 3.2776, 3.2754, 3.2779, 3.2775, 3.2782, 3.2779]
    old = [3.2784, 3.2778, 3.2766, 3.2771, 3.2764, 3.2768, 3.276, 3.279, 3.2747, 3.2772]
    write(tmp_path / "new", *map(published_log, new, [162_857, 163_217] * 5), name="{}.txt")
    write(tmp_path / "old", *map(published_log, old, [164_254, 164_654] * 5), name="{}.txt")
    code, out, err = run(tmp_path / "new", "--vs", tmp_path / "old")
    assert code == 0 and not err and "new, 2 x NVIDIA H100 80GB HBM3" in out
    assert re.search(r"loss: 3\.2778 ± 0\.00\d\d; .* time, s: 163\.04 ± 0\.19", out)
    assert re.search(r"loss: 3\.2770 ± 0\.00\d\d; .* time, s: 164\.45 ± 0\.21", out)
    assert "new against old, unpaired" in out and "faster by 1.42 ± 0.19 s (0.9914 ± 0.0011 of" in out
    assert out.count("the mean loss meets the target 3.28 with p < 0.01") == 2


def test_all_logs_of_a_folder_are_read_or_named(race, run):
    write(race / "a/later", our_log(1.7, target=0.0), name="{}.txt")
    write(race / "unlisted", our_log(1.8, target=0.0), name="{}.log")
    write(race, our_log(1.9, target=0.0), name="{}.txt")
    (race / "link").symlink_to(race)
    out = run(race)[1]
    heads = [line.partition(",")[0] for line in out.splitlines() if line.endswith("2 CPUs, 2 threads")]
    assert heads == ["b", "a", "race", "later", "unlisted"]
    code, out, err = run(race / "a", race / "b")  # more than one path is one set
    assert code == 1 and not out and "later/1.txt differ in" in err
    (race / "b").rename(race.parent / "b")
    (race / "b").mkdir()
    (race / "b/round-01.md").write_text(GOOD)
    found_none = f"{race / 'b'}: expected logs (*.txt) of one version, found none.\n"
    assert run(race) == (1, "", found_none)
    assert run(race / "a/later", race / "b") == (1, "", found_none)


@pytest.mark.parametrize("name", ["a/later/1.txt", "unlisted/1.log", "1.TXT", "a/round-04.part"])
def test_no_log_is_left_out_whatever_its_name_and_place(race, run, name):
    """Beside the versions, below them, in a folder that race.json does not list: it is read, or refused."""
    (race / name).parent.mkdir(exist_ok=True)
    (race / name).write_text(GOOD.partition("peak")[0])
    code, out, err = run(race)
    assert code == 1 and not out and err.startswith(f"{race / name}: not the log of a complete run: ")
    (race / name).write_text(our_log(1.9, target=0.0, mlp_dim=9))
    code, out, err = run(race)
    assert code == 0 and "loss 1.9000 at step 4" in out


def test_other_texts_beside_the_versions_are_no_logs(race, run):
    for name in ("profile.txt", "console.log"):
        (race / name).write_text("shopping list\n")
    assert run(race)[0] == 0
    (race / "a/profile.txt").write_text("shopping list\n")
    assert f"{race}/a/profile.txt: not a log" in run(race)[2]


GOOD = our_log()
BAD = {
    "found 2 steps, and at the end ": GOOD.partition("step:3/4 ")[0] + "stopped by SIGTERM\n",
    "a line on peak memory": GOOD.partition("peak")[0],
    "expected all steps from 1 on": re.sub("step:3/4 .*\n", "", GOOD),
    "from 1 on": re.sub("step:[01]/4 .*\n", "", GOOD),  # resumed
    "then a finite validation loss": re.sub("step:4/4 val_loss.*\n", "", GOOD),
    "a finite validation loss": GOOD.replace("val_loss:1.6000 train", "val_loss:nan train"),
    "expected source, environment, settings and steps": "shopping list\n",
}


@pytest.mark.parametrize("what", BAD)
def test_a_log_that_is_not_of_a_complete_run_is_refused(tmp_path, run, what):
    log = write(tmp_path, BAD[what], GOOD) / "round-01.txt"
    code, out, err = run(tmp_path)
    assert code == 1 and not out and err.startswith(f"{log}: not ")
    assert what in err and err.count("\n") == 1


def test_without_a_log_the_exit_code_is_1(tmp_path, run):
    assert "No such file or directory" in run(tmp_path / "none.txt")[2]
    code, out, err = run(tmp_path)
    assert code == 1 and not out and err == f"{tmp_path}: expected logs (*.txt) of one version, found none.\n"


@pytest.mark.parametrize("other, what", [
    (our_log(1.5, source="print(2)\n"), "differ in source: "),
    (our_log(1.5, mlp_dim=5), "differ in mlp_dim (None, 5): "),
    (GOOD, "the same run as another log; name it once."),
])
def test_a_set_is_of_one_version(tmp_path, run, other, what):
    code, out, err = run(write(tmp_path, GOOD, other))
    assert code == 1 and not out and what in err and err.count("\n") == 1


@pytest.fixture
def race(tmp_path):
    """The folder of a race: b, the first, and a, in three rounds."""
    losses, times = (1.60, 1.50, 1.40), (100, 110, 120)
    write(tmp_path / "race/b", *(our_log(x, ms, target=0.0, seed=ms) for x, ms in zip(losses, times)))
    write(tmp_path / "race/a", *(our_log(x + d, ms / 2 + e, target=0.0, mlp_dim=9)
                                 for x, ms, d, e in zip(losses, times, (0.01, 0.02, 0.03), (0, 0, 3))))
    (tmp_path / "race/race.json").write_text('{"versions": [{"label": "b"}, {"label": "a"}]}')
    return tmp_path / "race"


def test_a_race_is_paired_by_round_and_gives_differences_and_a_ratio(race, run):
    code, out, err = run(race)
    assert code == 0 and not err and "target" not in out and out.index("b, 2 CPUs") < out.index("a, 2 CPUs")
    t = 4.302653  # of a t-distribution with 2 degrees of freedom, at 97.5 %
    half = t * statistics.stdev([0.200, 0.220, 0.228]) / 3**0.5
    logs = [math.log(0.5), math.log(0.5), math.log(63 / 120)]
    ratio, width = math.exp(statistics.fmean(logs)), t * statistics.stdev(logs) / 3**0.5
    assert out.splitlines()[-1] == (
        f"a against b, paired over 3 rounds: faster by 0.22 ± {half:.2f} s "
        f"({ratio:.4f} ± {ratio * math.sinh(width):.4f} of the time); "
        f"no clear difference in loss: +0.0200 ± {t * 0.01 / 3**0.5:.4f}")


def on_gpus(count, log):
    """A log of ours as from a machine with GPUs, of which a run used this many."""
    log = log.replace("platform:", f"{SMI}\nplatform:").replace("1 rank x", f"{count} ranks x")
    return log.replace("device: cpu, no CUDA GPU is here", "device: cuda (a CUDA GPU is here)")


def on_many_cpus(log):
    return log.replace("2 CPUs, 2 threads", "64 CPUs, 32 threads")


@pytest.mark.parametrize("machine_of_a, machine_of_b, there, here", [
    (on_many_cpus, str, "64 CPUs, 32 threads", "2 CPUs, 2 threads"),
    (partial(on_gpus, 8), partial(on_gpus, 1), "8 x NVIDIA H100 80GB HBM3", "1 x NVIDIA H100 80GB HBM3"),
])
def test_times_of_unlike_hardware_have_no_verdict(race, run, machine_of_a, machine_of_b, there, here):
    """The losses have; and one set is of one machine."""
    for version, machine in ("a", machine_of_a), ("b", machine_of_b):
        for log in (race / version).iterdir():
            log.write_text(machine(log.read_text()))
    code, out, _ = run(race)
    assert code == 0 and out.splitlines()[-1].startswith(
        f"a against b, paired over 3 rounds: times of unlike hardware do not compare ({there}; {here}); "
        "no clear difference in loss: +0.0200 ±")
    write(race / "a", machine_of_b(our_log(1.3, mlp_dim=9, target=0.0)), name="x.txt")
    code, out, err = run(race / "a")
    assert code == 1 and not out and err.count("\n") == 1
    assert f"a/x.txt differ in hardware ({there}; {here}), so" in err


TESLA = SMI.replace("NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB ")


@pytest.mark.parametrize("environment, lines, expected", [
    (SMI, "", "2 x NVIDIA H100 80GB HBM3"),
    (SMI, "device: cuda (a CUDA GPU is here)\nbatch: 1 ranks", "1 x NVIDIA H100 80GB HBM3"),
    (SMI + ", 2 CPUs, 1 threads", "device: cpu, as DEVICE says\nbatch: 1 ranks", "2 CPUs, 1 threads"),
    ("2 CPUs, 1 threads", "device: cpu (x)\nbatch: 2 ranks x 1 microbatch", "2 CPUs, 2 x 1 threads"),
    (TESLA + ", 2 CPUs, 1 threads", "", "2 x Tesla V100-SXM2-16GB"),
    ("2 CPUs, 1 threads, nvidia-smi: not found", "device: cuda (x)\nbatch: 8 ranks", "8 x unknown GPU"),
])
def test_hardware_is_what_computes(environment, lines, expected):
    assert report.describe_hardware(environment, lines) == expected


def test_rounds_that_only_one_version_has_are_not_paired(race, run):
    (race / "a/round-02.txt").unlink()
    assert "a against b, paired over 2 rounds" in run(race)[1]
    (race / "a/round-03.txt").unlink()
    said = "paired over 1 rounds: too few runs to judge time: -0.20 s (0.5000 of the time); too few runs"
    assert said in run(race)[1]


def test_a_version_that_missed_its_target_is_not_faster(tmp_path, run):
    """It ended sooner, at a higher loss; and between other steps losses are not compared."""
    write(tmp_path / "old", our_log(1.6, 100, seed=1), our_log(1.65, 110, seed=2))
    logs = [our_log(1.8, ms, seed=ms, mlp_dim=9, steps=2).splitlines(keepends=True) for ms in (50, 60)]
    late = "step:3/", "step:4/"
    write(tmp_path / "new", *("".join(x for x in log if not x.startswith(late)) for log in logs))
    code, out, err = run(tmp_path / "new", "--vs", tmp_path / "old")
    said = "paired over 2 rounds: times do not compare, since 2 and 0 runs did not reach their target"
    assert code == 0 and out.splitlines()[-1] == f"new against old, {said}"


def test_two_equal_differences_of_rounded_losses_give_no_certainty(tmp_path, run):
    """Without rounding they would differ, and with two rounds a little is much."""
    for version, losses, seen in (("old", (1.5920, 1.5883), 9), ("new", (1.5917, 1.5880), 8)):
        write(tmp_path / version, *(our_log(x, target=0.0, seed=x, mlp_dim=seen) for x in losses))
    code, out, _ = run(tmp_path / "new", "--vs", tmp_path / "old")
    assert code == 0 and out.endswith("no clear difference in loss: -0.0003 ± 0.0004\n"), out


def test_losses_are_compared_at_a_step(race, run):
    code, out, _ = run(race, "--step", 2)
    assert code == 0 and "loss 3.6000 at step 2, 0.20 s" in out
    assert "expected a validation at step 3, found none" in run(race, "--step", 3)[2]


def test_runs_that_reach_a_target_are_counted(tmp_path, run):
    write(tmp_path, our_log(1.6, target=0.0), our_log(1.75, target=0.0))
    out = run(tmp_path, "--target", 1.7)[1]
    assert "reached: 1 of 2, at step 4;" in out and "loss is not shown to meet the target 1.7" in out
    assert "reached: 2 of 2, at step 2 to 4;" in run(tmp_path, "--target", 3.7)[1]
    write(tmp_path, our_log(1.6, 90, target=0.0), our_log(1.6, 91, target=0.0))  # one seed, perhaps
    out = run(tmp_path, "--target", 1.7)[1]
    assert "p (mean" not in out and "loss is not shown to meet" in out


def test_the_time_to_a_target_is_where_a_line_between_the_last_validations_crosses_it(tmp_path, run):
    log = write(tmp_path / "a", our_log(1.2, target=1.7)) / "round-01.txt"
    assert report.read_log(log).finish == pytest.approx((3.5, 1.7, 0.35))  # from 3.2 at step 2
    out = run(tmp_path / "a")[1]
    assert "loss 1.2000 at step 4, 0.40 s; at its target in 0.35 s\n" in out
    assert "reached: 1 of 1, at step 4; time, s: 0.35; step, ms: 100.0\n" in out
    assert "time, s: 0.20;" in run(tmp_path / "a", "--step", 2)[1]
    missed = report.read_log(write(tmp_path, our_log(1.75)) / "round-01.txt")
    untargeted = report.read_log(write(tmp_path, our_log(target=0.0)) / "round-01.txt")
    once = re.sub("step:[02]/4 val_loss.*\n", "", our_log())
    for at_the_end in missed, untargeted, report.read_log(write(tmp_path, once) / "round-01.txt"):
        assert at_the_end.finish == at_the_end.end
    write(tmp_path / "b", our_log(1.2, ms=200, target=1.7))
    out = run(tmp_path / "a", "--vs", tmp_path / "b")[1]
    assert "too few runs to judge time: -0.35 s (0.5000 of the time)" in out


def test_there_is_p_only_of_runs_to_one_step_whatever_their_losses(tmp_path, run):
    """Not of runs that stop at their target, also if it is in the last planned step, nor at unlike steps."""
    for steps in (4, 9):
        stopped = write(tmp_path / "stopped", our_log(1.6, steps=steps), our_log(1.65, steps=steps))
        code, out, _ = run(stopped)
        assert code == 0 and "p (mean" not in out and "reached: 2 of 2, at step 4;" in out
        assert "  no claim on the mean loss: " in out and "is not shown" not in out
    fixed = write(tmp_path / "fixed", *(our_log(x, target=0.0) for x in (1.6, 1.65)))
    assert "p (mean ≤ target): 0.1 (1.7); " in run(fixed, "--target", 1.7)[1]
    group = report.load([fixed], target=1.7)[0]
    group.runs[0].end = group.runs[0].validations[2]
    assert math.isnan(report.p_value(group))


def test_the_plot_is_a_picture(race, run, tmp_path):
    assert run(race, "--plot", tmp_path / "x.png")[0] == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [[], ["x", "--leaderboard"]])
def test_wrong_arguments_have_exit_code_2(arguments):
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)


def test_a_console_need_not_have_all_characters(race, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert report.main([str(race), "--target", "1.55"]) == 0
    console.flush()
    assert b"p (mean ? target): 0." in console.buffer.getvalue()


def test_ctrl_c_is_no_traceback(race, run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "load", stop)
    assert run(race) == (130, "", "stopped by Ctrl-C\n")


@pytest.fixture
def records(race, monkeypatch):
    """A folder of two records: a race, and two runs of one version; and a race that is no record yet."""
    race = race.rename(race.with_name("2026-02-03_Two"))
    one = write(race.with_name("2026-01-02_One"), our_log(), our_log(1.5), name="{}.txt")
    (one / "README.md").write_text("# One run\n\nText.\n")
    write(race.with_name("2026-02-04_Mine"), our_log(), name="{}.txt")
    for folder in (race, race.parent):
        (folder / "README.md").write_text(f"# Wider\n\n{report.BEGIN}\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "RECORDS", race.parent)
    return race.parent


def test_the_tables_are_what_the_logs_give_and_the_leaderboard_has_what_had_a_target(records, run):
    assert run("--leaderboard")[0] == 0
    text = (records / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 2026")]
    assert text.startswith("# Wider") and text.endswith("\n\nafter\n")
    assert rows == ["| 2026-01-02 | [One run](2026-01-02_One) | 2 CPUs, 2 threads | 2 | 1.5500 ± 0.0707 | "
                    "- | 2 of 2, at step 4 | 0.39 ± 0.01 | 100.0 ± 0.0 |"]
    table = (records / "2026-02-03_Two/README.md").read_text()
    assert "| version | runs | final loss | time, s | step, ms | against b |\n" in table
    assert re.search(r"\| a \| 3 \|.*: faster by 0\.22", table)
    assert run("--leaderboard", "--check")[0] == 0
    for page in ("README.md", "2026-02-03_Two/README.md"):
        path = records / page
        text = path.read_text()
        path.write_text(text.replace("| 1.5", "| 1.4"))
        assert f"{path}: its table is not what" in run("--leaderboard", "--check")[2]
        path.write_text(text)


def test_a_race_json_says_that_times_do_not_compare_and_at_which_target(records, run):
    place = records / "2026-02-03_Two/race.json"
    about = json.loads(place.read_text())
    place.write_text(json.dumps(about | {"times_compare": False}))
    write(place.parent / "b", *(our_log(x, target=0.0) for x in (2.1, 2.2, 2.3)))
    assert run("--leaderboard")[0] == 0
    header, _, first, second = re.findall(r"\|.*\|", (place.parent / "README.md").read_text())
    assert header == "| version | runs | final loss | against b |"
    assert second == "| b | 3 | 2.2000 ± 0.1000 | - |"
    assert re.fullmatch(r"\| a \| 3 \| .* \| paired over 3 rounds: loss lower by 0\.\d+ ± 0\.\d+ \|", first)
    for paths in [place.parent], [place.parent / "a", "--vs", place.parent / "b"]:
        out = run(*paths)[1]
        assert "faster" not in out and "of the time" not in out and "time, s" not in out
    place.write_text("{")
    assert f"{place}: expected JSON, found " in run("--leaderboard")[2]
    place.write_text(json.dumps(about | {"target": 2.25}))
    assert run("--leaderboard")[0] == 0
    rows = [line for line in (records / "README.md").read_text().splitlines() if "_Two): b |" in line]
    assert len(rows) == 1 and "| 0.24 (2.25) | 2 of 3, at step 4 |" in rows[0]


def test_a_record_has_every_round(records, run):
    for version in ("a", "b"):  # the second time, round 2 of both is missing
        (records / f"2026-02-03_Two/{version}/round-02.txt").unlink()
        assert "expected round-02.txt, found none." in run("--leaderboard")[2]


def test_a_page_that_is_not_utf_8_is_named(records, run):
    page = records / "2026-01-02_One/README.md"
    page.write_bytes("# Größe\n".encode("latin-1"))
    assert f"{page}: expected a text in UTF-8, found " in run("--leaderboard")[2]


def test_the_tables_of_this_repository_are_what_their_logs_give(run):
    assert run("--leaderboard", "--check") == (0, "", "")
    assert f"\n{report.BEGIN}\n| date |" in (ROOT / "records/README.md").read_text(encoding="utf-8")
