"""What a run does in hard surroundings, full disks, odd paths and locales, and what it lets in; sampling."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import faults
import numpy as np
import pytest
from conftest import ROOT, launch, overrides, random_documents, write_shard
from faults import Started, checkpoints, content, ended_as, flip, losses, refused, resumed, same, up_to

import train_gpt
from train_gpt import UserError


def names(log_dir):
    return [folder.name for folder in checkpoints(log_dir)]


def written(text):
    """The steps after which a checkpoint was written, and those for which it could not be."""
    lines = [line for line in text.splitlines() if line.startswith("checkpoint: ")]
    good = [int(line[-6:]) for line in lines if "could not" not in line]
    return good, [int(line.split("step ")[1].split()[0]) for line in lines if "could not" in line]


# ---------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint_and_does_not_stop_the_run(s, whole, tmp_path):
    """Wherever in a checkpoint the room ends."""
    broken = {(2, "rank_0.bin"), (3, "checkpoint.json"), (5, "complete")}
    started = Started(s, tmp_path, partial(faults.no_room, broken))
    assert started.wait() == [0], started.text()
    assert written(started.text()) == ([1, 4, 6], [2, 3, 5])
    for step, newest in ((2, 1), (3, 1), (5, 4)):
        assert f"step {step} could not be written: [Errno 28] No space left" in started.text()
        assert started.text().count(f"goes on, and the newest is {s.log_dir}") == 3
    assert names(s.log_dir) == ["step_000006", "step_000004"] and ended_as(whole(), s.log_dir)
    assert not list(Path(s.log_dir).glob("*/*.partial"))


@pytest.mark.slow
def test_a_full_disk_on_one_rank_alone_costs_no_checkpoint(s, whole, tmp_path):
    broken = {(2, "rank_1.bin"), (6, "rank_1.bin")}
    started = Started(s, tmp_path, partial(faults.no_room, broken), ranks=2)
    assert started.wait() == [0, 0], started.text()
    assert written(started.text()) == ([1, 3, 4, 5], [2, 6])
    assert names(s.log_dir) == ["step_000005", "step_000004"] and losses(s.log_dir) == losses(whole(2))
    assert same(content(checkpoints(s.log_dir)[0]), content(sorted(checkpoints(whole(2)))[4]))


def test_a_quota_that_the_kernel_sets_costs_no_checkpoint(s, whole, tmp_path):
    size = (checkpoints(whole())[0] / "rank_0.bin").stat().st_size
    logged = sum(path.stat().st_size for path in whole().glob("*.txt"))
    assert size > logged + 65_536, "the log must fit where the checkpoint does not"
    started = Started(s, tmp_path, partial(faults.quota, size - 1000, 3, 5))
    assert started.wait() == [0], started.text()
    assert written(started.text()) == ([1, 2, 5, 6], [3, 4]) and ended_as(whole(), s.log_dir)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted only by root, on a machine that lets it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_file_system_that_fills_up_costs_no_checkpoint(s, whole, tmp_path, small_disk):
    s = replace(s, log_dir=str(small_disk / "logs"))
    started = Started(s, tmp_path, partial(faults.full_disk, small_disk, 3, 5))
    assert started.wait() == [0], started.text()
    assert written(started.text()) == ([1, 2, 5, 6], [3, 4])
    assert same(content(checkpoints(s.log_dir)[0]), content(checkpoints(whole())[0]))


def test_too_little_room_is_found_before_the_first_step(s, tmp_path):
    started = Started(s, tmp_path, partial(faults.little_room, 1))
    (code,), text = started.wait(), started.text()
    said = text.splitlines()[-1]
    assert refused(code, said + "\n") and "LOG_DIR: expected 2 MB of free disk space" in said, text
    assert "for 3 more checkpoints (CHECKPOINT_KEEP=2" in said and "found 1 MB" in said
    assert "step:0" not in text


@pytest.mark.slow
def test_room_is_asked_only_for_what_is_still_to_be_written(s, whole, tmp_path):
    """One megabyte holds one checkpoint, and not three."""
    started = Started(replace(s, checkpoint_every=0, checkpoint_last=True), tmp_path, one_megabyte)
    assert started.wait() == [0] and names(s.log_dir) == ["step_000006"], started.text()
    up_to(4, whole(), s.log_dir)
    os.utime(Path(s.log_dir) / "before.checkpoints" / "step_000004")
    code, text = resumed(s, tmp_path, one_megabyte)
    assert code == 0 and "before.checkpoints/step_000004, step 4" in text, text


one_megabyte = partial(faults.little_room, 1)


def test_a_log_that_cannot_grow_is_said_once_and_does_not_stop_the_run(s, whole, tmp_path):
    """It fills up after its head, for two steps."""
    started = Started(replace(s, checkpoint_every=0), tmp_path, partial(faults.quota, 50_000, 3, 5))
    assert started.wait() == [0] and losses(s.log_dir) == losses(whole()), started.text()
    assert started.text().count("expected to write the log, found: [Errno 27]") == 1


# ---------------------------------------------------------------------------------------------------
# Users, paths, locales, interpreters


@pytest.mark.slow
def test_a_user_who_may_write_only_in_log_dir_needs_no_more(s, shared, whole):
    with tempfile.TemporaryDirectory() as folder:
        home, logs = Path(folder) / "home", Path(folder) / "logs"
        for path, mode in ((Path(folder), 0o755), (home, 0o555), (logs, 0o777)):
            path.mkdir(exist_ok=True)
            path.chmod(mode)
        for name in ("train_0.bin", "val_0.bin"):
            (Path(folder) / name).write_bytes((Path(shared.train_files).parent / name).read_bytes())
        files = dict(train_files=f"{folder}/train_*.bin", val_files=f"{folder}/val_*.bin")
        s = replace(s, log_dir=str(logs), **files)
        started = Started(s, folder, faults.nobody, cwd=home, HOME=home)
        assert started.wait() == [0], started.text()
        assert losses(logs) == losses(whole()) and not list(home.iterdir())
        refusing = replace(s, log_dir=str(home / "logs"))
        started = Started(refusing, folder, faults.nobody, cwd=home, HOME=home)
        (code,), said = started.wait(), started.text()
        assert code and said.startswith("LOG_DIR: expected a folder to write") and said.count("\n") == 1
        (run,) = logs.glob("*.checkpoints")
        run.chmod(0o555)
        code, text = resumed(s, folder, faults.nobody, cwd=home)
        said = text.splitlines()[-1]
        if os.getuid() == 0:  # the checkpoints are another's, and may be read
            assert refused(code, said + "\n") and "LOG_DIR: expected to write checkpoints in" in said, text
        run.chmod(0o755)


@pytest.fixture
def odd(s, shared, tmp_path):
    """Settings with all files in a folder whose name has spaces and more than one alphabet."""
    folder = tmp_path / "ein schöner Ordner – 学習"
    folder.mkdir()
    for name in ("train_0.bin", "val_0.bin"):
        (folder / name).write_bytes((Path(shared.train_files).parent / name).read_bytes())
    files = dict(train_files=f"{folder}/train_*.bin", val_files=f"{folder}/val_*.bin")
    return replace(s, log_dir=str(folder / "logs"), resume="auto", **files)


@pytest.mark.slow
def test_odd_paths_and_python_without_asserts_change_nothing(odd, whole):
    """A second process, which can show only ASCII, goes on from the last checkpoint but one."""
    done = launch(**overrides(odd), LC_ALL="C", PYTHONOPTIMIZE=1)
    assert done.returncode == 0 and "log: " in done.stdout, done.stderr
    assert ended_as(whole(), odd.log_dir)
    flip(checkpoints(odd.log_dir)[0] / "rank_0.bin", random.Random(0))
    done = launch(**overrides(odd), PYTHONIOENCODING="ascii", PYTHONOPTIMIZE=1)
    assert done.returncode == 0 and "step 5, after" in done.stdout, done.stderr
    assert ended_as(whole(), odd.log_dir)


@pytest.mark.slow
def test_a_path_that_the_locale_cannot_show_changes_nothing(odd, whole):
    done = launch(**overrides(odd), LC_ALL="C", PYTHONUTF8=0, PYTHONCOERCECLOCALE=0)
    assert done.returncode == 0 and ended_as(whole(), odd.log_dir)


# ---------------------------------------------------------------------------------------------------
# What it lets in

GUARDED = """
import sys

def guard(event, args):
    if event.startswith("socket.") and event.split(".")[1] in ("connect", "sendto", "sendmsg", "getaddrinfo",
                                                               "gethostbyname", "gethostbyaddr"):
        host = args[1][0] if isinstance(args[1], tuple) else args[0]
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise SystemExit(f"no network, please: {event} {args}")
    if event == "pickle.find_class" and "train_gpt" in sys.modules:
        raise SystemExit(f"no pickle, please: {args}")

sys.addaudithook(guard)
try:
    import os
    os.unshare(os.CLONE_NEWNET)  # Python 3.12, as root: no network for its C++ either
except (AttributeError, OSError):
    pass
sys.path.insert(0, sys.argv[1])
import pickle, torch, train_gpt

def refuse(*args, **kwargs):
    raise SystemExit("no pickle, please")

torch.load = pickle.load = pickle.loads = refuse
for _ in range(2):
    if (child := os.fork()) == 0:
        os._exit(train_gpt.main([]))
    print("code", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_neither_import_nor_run_nor_resume_uses_a_network_or_reads_pickle(s, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(GUARDED)
    s = replace(s, resume="auto", checkpoint_every=2)
    done = launch(ROOT, script=program, cwd=tmp_path, **overrides(s))
    assert done.stdout.count("\ncode 0\n") == 2 and "step 6, after" in done.stdout, done.stderr + done.stdout


def test_the_network_guard_of_these_tests_does_guard(tmp_path):
    asks = "import socket; socket.create_connection(('192.0.2.1', 80))"
    program = GUARDED.split("sys.path")[0] + asks
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode and "no network, please" in done.stderr


# ---------------------------------------------------------------------------------------------------
# Sampling


@pytest.fixture(scope="module")
def bytes_model(shared, tmp_path_factory):
    """A checkpoint of a model of bytes that has hardly learnt."""
    folder = tmp_path_factory.mktemp("bytes")
    for name, seed, count in (("train_0", 1, 200), ("val_0", 2, 40)):
        documents = random_documents(seed, count, vocab_size=257, bos=256)
        write_shard(folder / f"{name}.bin", np.concatenate(documents))
    files = dict(train_files=str(folder / "train_*.bin"), val_files=str(folder / "val_*.bin"))
    settings = replace(shared, vocab_size=257, bos_id=256, log_dir=str(folder / "logs"), num_iterations=2)
    started = Started(replace(settings, **files), folder)
    assert started.wait() == [0], started.text()
    return checkpoints(folder / "logs")[0]


def with_settings(checkpoint, folder, **changes):
    """A whole checkpoint whose settings are others."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    about = json.loads((folder / "checkpoint.json").read_text())
    about["settings"] |= changes
    raw = json.dumps(about).encode()
    (folder / "checkpoint.json").write_bytes(raw)
    (folder / "complete").write_text(hashlib.sha256(raw).hexdigest())
    return folder


def test_a_sample_begins_with_its_prompt_and_is_that_of_its_seed(bytes_model, run_main):
    def sampled(*more):
        arguments = ("--sample", str(bytes_model), "--prompt", "Größe: ", "--length", "40", *more)
        code, shown, said = run_main(*arguments)
        assert (code, said) == (0, "") and shown.startswith("Größe: ") and shown.endswith("\n")
        return shown

    first = sampled()
    assert len(first) > 20 and sampled() == first == sampled("--sample-seed", "0")
    assert sampled("--sample-seed", "1") != first
    cold = sampled("--temperature", "0")
    assert cold == sampled("--temperature", "0", "--sample-seed", "1") != first
    assert sampled("--length", "0") == "Größe: \n"


def test_a_checkpoint_of_a_gpu_is_sampled_where_there_is_none(bytes_model, tmp_path, run_main):
    gpu = with_settings(bytes_model, tmp_path / "gpu", device="cuda")
    arguments = ("--prompt", os.fsdecode(b"\xff"), "--length", "5")
    code, shown, said = run_main("--sample", str(gpu), *arguments)
    assert (code, said) == (0, "") and shown == run_main("--sample", str(bytes_model), *arguments)[1]


def test_a_sample_has_the_windows_of_the_checkpoints_step(bytes_model, tmp_path, run_main, monkeypatch):
    real, steps = train_gpt.attention_windows, []
    monkeypatch.setattr(train_gpt, "attention_windows", lambda step, s: steps.append(step) or real(step, s))
    early = with_settings(bytes_model, tmp_path / "early", num_iterations=9)
    assert run_main("--sample", str(early), "--length", "2")[0] == 0 and steps == [2]


def test_what_cannot_be_sampled_is_one_sentence(bytes_model, tmp_path, run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    other = with_settings(bytes_model, tmp_path / "other", vocab_size=300)
    gpt2 = with_settings(bytes_model, tmp_path / "gpt2", vocab_size=50_257, bos_id=50_256)
    newer = with_settings(bytes_model, tmp_path / "newer", colour="red")
    damaged = with_settings(bytes_model, tmp_path / "damaged")
    flip(damaged / "rank_0.bin", random.Random(0))
    for folder, expected in (
        (other, "vocabulary of bytes (257 ids) or of GPT-2 (50,257), found 300 ids"),
        (gpt2, "expected tiktoken with GPT-2's vocabulary"),
        (newer, "colour"),
        (damaged, "expected SHA-256"),
        (tmp_path / "nowhere", "No such file"),
    ):
        code, shown, said = run_main("--sample", str(folder))
        assert (code, shown, said.count("\n")) == (1, "", 1) and said.startswith("--sample: "), said
        assert expected in said and str(folder if "vocab" not in expected else "") in said


def test_gpt2s_vocabulary_is_tiktokens(small, monkeypatch):
    gpt2 = types.SimpleNamespace(
        encode_ordinary=lambda text: [len(text)], decode_single_token_bytes=lambda token: b"%d" % token
    )
    load = types.SimpleNamespace(read_file=lambda address: pytest.fail("fetched"))
    fake = types.SimpleNamespace(get_encoding=lambda name: gpt2 if name == "gpt2" else None, load=load)
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    monkeypatch.setitem(sys.modules, "tiktoken.load", load)
    encode, decode = train_gpt.tokenizer_of(replace(small, vocab_size=50_257, bos_id=50_256))
    assert (encode("four"), decode(17)) == ([4], b"17")
    with pytest.raises(FileNotFoundError, match="not in tiktoken's cache"):  # --sample uses no network
        load.read_file("https://vocab")
    with pytest.raises(UserError, match="^--sample: expected a vocabulary"):
        train_gpt.tokenizer_of(replace(small, vocab_size=50_257, bos_id=0))
