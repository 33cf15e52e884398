"""The FineWeb fetcher, run as a user runs it, through the real client, against a small hub on loopback."""

import hashlib
import importlib.util
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, environment, launch

import train_gpt

SCRIPT = ROOT / "data" / "cached_fineweb10B.py"
SPEC = importlib.util.spec_from_file_location("cached_fineweb10B", SCRIPT)
fineweb = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fineweb)

VAL, ONE, TWO, THREE = ("fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)))
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"  # commits
LARGE = 6_000_000  # tokens: 12 MB; the client writes 10 MiB at a time, so less than that cannot be resumed
WRITTEN = 10 * 2**20


def shard(seed, tokens=500, magic=20240520, version=1, count=None):
    """A token shard's bytes, random below the header."""
    header = struct.pack("<256i", magic, version, tokens if count is None else count, *[0] * 253)
    return header + random.Random(seed).randbytes(2 * tokens)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------------
# A hub on loopback


class Hub(ThreadingHTTPServer):
    """Plays the hub for one dataset, and breaks it as told.

    `commits` maps a commit to its files' bytes; `main` names one. `faults` maps "list" or a file's name to
    what its next requests meet instead, in order; the last one stays if it is followed by "always":
    a number is an HTTP status, bytes are served as the file, ("cut", n) ends the connection after n bytes of
    the body, ("reset", n) does so with a TCP reset, ("stall", n) waits there until the hub closes.
    `asked` lists every request for "list" and for bytes, as (name, Range header).
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits, self.main = {OLD: files}, OLD
        self.faults, self.asked, self.closing = {}, [], threading.Event()
        self.without_sha, self.without_range = set(), False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def next_fault(self, name):
        faults = self.faults.get(name, [])
        if not faults:
            return None
        return faults[0] if faults[1:] == ["always"] else faults.pop(0)

    def handle_error(self, request, client_address):
        pass  # a client that was killed is no news


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        listing, resolve, cdn = (
            f"/api/datasets/{fineweb.REPOSITORY}/revision/",
            f"/datasets/{fineweb.REPOSITORY}/resolve/",
            "/cdn/",
        )
        if path.startswith(listing):
            self.list_files(path.removeprefix(listing))
        elif path.startswith(resolve):  # as the hub does: bytes come from another place
            self.reply(302, b"", Location=cdn + path.removeprefix(resolve))
        elif path.startswith(cdn):
            self.send_file(*path.removeprefix(cdn).split("/"))
        else:
            self.reply(404, b"no such place")

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def list_files(self, revision):
        self.server.asked.append(("list", revision))
        fault = self.server.next_fault("list")
        commit = self.server.main if revision == "main" else revision
        if isinstance(fault, int):
            return self.reply(fault, b"{}")
        if isinstance(fault, bytes):
            return self.reply(200, fault)
        if fault:
            return self.server.closing.wait(60)
        if commit not in self.server.commits:
            return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": ".gitattributes", "size": 10, "blobId": "0" * 40}]
        for name, content in self.server.commits[commit].items():
            lfs = {"size": len(content), "sha256": sha256(content), "pointerSize": 130}
            entry = {"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs}
            siblings.append({**entry, "lfs": None} if name in self.server.without_sha else entry)
        answer = {"id": fineweb.REPOSITORY, "sha": commit, "siblings": siblings}
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def send_file(self, commit, name):
        wanted = self.headers["Range"]
        self.server.asked.append((name, wanted))
        fault = self.server.next_fault(name)
        if isinstance(fault, int):
            return self.reply(fault, b"")
        content = fault if isinstance(fault, bytes) else self.server.commits[commit][name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if self.server.without_range:
            start, wanted = 0, None
        if wanted and start >= len(content):
            return self.reply(416, b"", Content_Range=f"bytes */{len(content)}")
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not isinstance(fault, tuple):
            self.wfile.write(content[start:])
            return
        kind, end = fault
        self.wfile.write(content[start:end])
        self.wfile.flush()
        if kind == "stall":
            self.server.closing.wait(60)
        elif kind == "reset":
            time.sleep(0.3)  # until the client has read what was sent; a reset throws away the rest
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


@pytest.fixture
def hub():
    hub = Hub({VAL: shard(0), ONE: shard(1), TWO: shard(2, tokens=700), THREE: shard(3)})
    yield hub
    hub.close()


@pytest.fixture
def site(tmp_path, hub, monkeypatch):
    """What a run sees: the hub on loopback, and a data and a home folder of its own, empty at first."""
    home = tmp_path / "home"
    data = tmp_path / "data_path"
    data.mkdir()
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("DATA_PATH", str(data))
    return data / "data" / "fineweb10B"


def fetch(*arguments, **variables):
    return launch(*arguments, script=SCRIPT, **{"DATA_PATH": os.environ["DATA_PATH"]} | variables)


def fetched(*arguments, **variables):
    done = fetch(*arguments, **variables)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


def complaint(*arguments, code=1, **variables):
    """The one sentence of a run that fails."""
    done = fetch(*arguments, **variables)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(".\n"), done.stderr
    return done.stderr


def shards(site):
    """Names and bytes of all files but the script's own two, hidden ones included."""
    return {p.name: p.read_bytes() for p in site.iterdir() if p.name not in (".lock", "verified.json")}


def holds(site, hub, *names, commit=OLD):
    return shards(site) == {name: hub.commits[commit][name] for name in names}


def bytes_asked(hub):
    """Requests for files' bytes, without the one for the list of files."""
    return [request for request in hub.asked if request[0] != "list"]


# ---------------------------------------------------------------------------------------------------
# What is fetched


def test_fetches_the_validation_shard_and_the_first_n_and_says_what_is_next(site, hub):
    out = fetched(2)
    assert holds(site, hub, VAL, ONE, TWO)
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        f"[{i}/3] {name}: fetched" for i, name in enumerate((VAL, ONE, TWO), start=1)
    ]
    last = out.splitlines()[-1]
    assert "2 training shards of 1,200 tokens" in last and OLD in last and last.endswith("./run.sh")
    assert hub.asked == [("list", "main"), (VAL, None), (ONE, None), (TWO, None)]


def test_what_was_fetched_trains(site, hub):
    fetched(1)
    opened = train_gpt.open_shards(train_gpt.Settings(data_path=os.environ["DATA_PATH"]), "train_files")
    assert [x.num_tokens for x in opened] == [500]


def test_the_default_is_what_the_speedrun_needs_and_the_environment_may_change_it(site, hub):
    for i in range(4, 11):
        hub.commits[OLD][f"fineweb_train_{i:06d}.bin"] = shard(i)
    out = fetched()
    assert "1,705 steps of 393,216 tokens need 10 training shards" in out and len(shards(site)) == 11
    out = fetched(NUM_ITERATIONS=300, BATCH_TOKENS=100_000)
    assert "need 1 training shard\n" in out and "[2/2]" in out and "[3/" not in out


def test_the_default_follows_from_the_measured_share_of_used_tokens():
    race = train_gpt.Settings()
    assert fineweb.SPEEDRUN == {"NUM_ITERATIONS": race.num_iterations, "BATCH_TOKENS": race.batch_tokens}
    assert fineweb.shards_needed(race.num_iterations, race.batch_tokens) == 10
    assert fineweb.shards_needed(1697, 393_216) == 9 and fineweb.shards_needed(1698, 393_216) == 10
    assert fineweb.shards_needed(1, 1) == 1 and fineweb.shards_needed(2 * 1697, 393_216) == 18
    used = 1697 * 393_216 / 900e6
    assert fineweb.shards_needed(5000, 393_216) == -(-5000 * 393_216 // (used * 100e6))


def test_a_run_longer_than_the_repository_gets_all_of_it_and_is_told_of_epochs(capsys):
    assert fineweb.planned_shards({"NUM_ITERATIONS": "20000"}) == 103
    assert "need 107" in capsys.readouterr().out
    assert fineweb.planned_shards({"NUM_ITERATIONS": "40000"}) == 103
    assert "EPOCHS=3" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["0", "104", "ten", "1.5", "-1", "", "9" * 50])
def test_a_wrong_number_of_shards_is_one_sentence(site, hub, wrong):
    assert complaint(wrong, code=2).startswith("N: expected a whole number of 1 to 103, found")
    assert not hub.asked and not site.exists()


@pytest.mark.parametrize("name", ["NUM_ITERATIONS", "BATCH_TOKENS"])
@pytest.mark.parametrize("wrong", ["0", "many", "1e3", str(2**31)])
def test_a_wrong_setting_is_one_sentence(name, wrong):
    with pytest.raises(fineweb.UserError, match=f"^{name}: expected a whole .*{wrong}") as error:
        fineweb.planned_shards({name: wrong})
    assert error.value.exit_code == 2


def test_a_wrong_setting_ends_the_run_with_code_2(site, hub):
    assert "NUM_ITERATIONS" in complaint(code=2, NUM_ITERATIONS="x")
    assert "DATA_PATH" in complaint(1, code=2, DATA_PATH=site / "nowhere")
    assert not hub.asked and not (site / "nowhere").exists()


def test_importing_has_no_effect(site, hub):
    code = "import sys, cached_fineweb10B; print('huggingface_hub' in sys.modules)"
    env = environment(PYTHONPATH=ROOT / "data", DATA_PATH=os.environ["DATA_PATH"])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n" and not done.stderr and not hub.asked and not site.exists()


def test_nothing_but_the_endpoint_is_connected_to(site, hub, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def audit(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto', 'socket.gethostbyname'):\n"
        "        where = args[1][:2] if event == 'socket.connect' else args[:2]\n"
        f"        os.write(os.open({str(tmp_path / 'calls')!r}, 1089, 0o600), f'{{where}}\\n'.encode())\n"
        "sys.addaudithook(audit)\n"
    )
    fetched(1, PYTHONPATH=tmp_path)
    port = hub.server_address[1]
    assert set((tmp_path / "calls").read_text().splitlines()) == {f"('127.0.0.1', {port})"}


# ---------------------------------------------------------------------------------------------------
# What is there already


def test_a_second_run_asks_nobody(site, hub):
    fetched(2)
    hub.close()
    out = fetched(2)
    assert out.count(": already there\n") == 3 and "fetched" not in out
    assert fetched(1).count(": already there\n") == 2 and len(shards(site)) == 3


def test_a_good_file_from_elsewhere_is_hashed_once_and_not_fetched(site, hub):
    site.mkdir(parents=True)
    for name in (VAL, ONE):
        (site / name).write_bytes(hub.commits[OLD][name])
    out = fetched(1)
    assert out.count("comparing its SHA-256") == 2 and out.count(": already there\n") == 2
    assert hub.asked == [("list", "main")]
    assert "comparing" not in fetched(1) and len(hub.asked) == 1


def test_more_shards_keep_those_that_are_there(site, hub):
    fetched(1)
    inode = (site / ONE).stat().st_ino
    assert "comparing" not in fetched(2)
    assert holds(site, hub, VAL, ONE, TWO) and (site / ONE).stat().st_ino == inode
    assert [name for name, _ in bytes_asked(hub)] == [VAL, ONE, TWO]


@pytest.mark.parametrize(
    "damaged, why",
    [
        (shard(99), "expected SHA-256"),
        (shard(1)[:-2], "expected 2,024 bytes, as the header counts 500 tokens, found 2,022"),
        (shard(1) + b"\0", "found 2,025"),
        (b"", "expected 1,024 bytes of header, found 0 bytes"),
        (shard(1)[:11], "found 11 bytes"),
        (shard(1, magic=1), "expected magic number 20240520 and version 1, found 1 and 1"),
        (shard(1, version=2), "found 20240520 and 2"),
        (shard(1, count=501), "as the header counts 501 tokens"),
        (shard(1, tokens=0, count=-1), "found -1"),
    ],
)
def test_a_damaged_file_is_fetched_again(site, hub, damaged, why):
    site.mkdir(parents=True)
    (site / VAL).write_bytes(hub.commits[OLD][VAL])
    (site / ONE).write_bytes(damaged)
    out = fetched(1)
    line = next(line for line in out.splitlines() if "damaged" in line)
    assert line.startswith(f"[2/2] {ONE}: damaged, fetching again (") and why in line
    assert holds(site, hub, VAL, ONE) and bytes_asked(hub) == [(ONE, None)]


def test_a_file_that_changed_after_it_was_verified_is_verified_again(site, hub):
    fetched(1)
    good = (site / ONE).read_bytes()
    (site / ONE).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(site / VAL)
    out = fetched(1)
    assert f"[1/2] {VAL}: already there" in out and f"{ONE}: damaged" in out and holds(site, hub, VAL, ONE)


def test_a_failed_run_leaves_the_files_that_were_there(site, hub):
    fetched(1)
    before = shards(site)
    (site / ONE).write_bytes(b"damaged")
    hub.faults[ONE] = [404]
    complaint(1)
    assert shards(site) == before | {ONE: b"damaged"}


@pytest.mark.parametrize("content", ["", "[]", '{"revision": "main", "files": {}}', '{"revision": 1}', "\0"])
def test_a_damaged_memory_is_made_anew(site, hub, content):
    fetched(1)
    (site / "verified.json").write_text(content)
    out = fetched(1)
    assert "verified.json: damaged" in out and out.count("already there") == 2
    assert json.loads((site / "verified.json").read_text())["revision"] == OLD


def test_a_remembered_hash_that_is_not_the_hubs_is_not_believed(site, hub):
    fetched(1)
    memory = site / "verified.json"
    memory.write_text(memory.read_text().replace(sha256(shard(1)), "0" * 64))
    assert f"{ONE}: comparing its SHA-256" in fetched(2)
    assert holds(site, hub, VAL, ONE, TWO) and (ONE, None) not in hub.asked[3:]


# ---------------------------------------------------------------------------------------------------
# The revision


def test_the_first_runs_commit_stays_when_main_moves_on(site, hub):
    fetched(1)
    hub.commits[NEW] = {name: shard(name) for name in (VAL, ONE, TWO)}
    hub.main = NEW
    fetched(2)
    assert holds(site, hub, VAL, ONE, TWO) and hub.asked[-2:] == [("list", OLD), (TWO, None)]


def test_another_revision_is_pinned_on_request(site, hub):
    fetched(1)
    hub.commits[NEW] = {VAL: shard(0), ONE: shard(10)}
    hub.main = NEW
    out = fetched(1, "--revision", "main")
    assert f"{VAL}: already there" in out and f"{ONE}: fetched" in out
    assert holds(site, hub, VAL, ONE, commit=NEW)
    hub.close()
    assert NEW in fetched(1) and NEW in fetched(1, "--revision", NEW)


def test_a_file_verified_at_one_commit_does_not_count_at_another(site, hub):
    fetched(1)
    hub.commits[NEW] = {VAL: shard(0), ONE: shard(10)}
    hub.faults[ONE] = [404]
    complaint(1, "--revision", NEW)
    assert holds(site, hub, VAL, ONE, commit=OLD)  # as they were, but from now on NEW is the pinned commit
    assert f"{ONE}: damaged, fetching again" in fetched(1)
    assert holds(site, hub, VAL, ONE, commit=NEW)


def test_a_revision_that_is_not_there_is_one_sentence_and_pins_nothing(site, hub):
    fetched(1)
    text = complaint(1, "--revision", "v2")
    assert "at revision v2, found HTTP 404" in text and hub.url in text
    assert OLD in fetched(1) and holds(site, hub, VAL, ONE)


# ---------------------------------------------------------------------------------------------------
# A hub or a line that fails


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_cut_connection_is_taken_up_where_it_ended(site, hub, kind):
    hub.commits[OLD][ONE] = shard(1, LARGE)
    hub.faults[ONE] = [(kind, 11_000_000)]
    fetched(1)
    assert holds(site, hub, VAL, ONE) and bytes_asked(hub)[1:] == [(ONE, None), (ONE, f"bytes={WRITTEN}-")]


@pytest.mark.slow
def test_a_connection_that_is_always_cut_ends_in_a_sentence(site, hub):
    hub.faults[VAL] = [("cut", 100), "always"]
    text = complaint(1)
    assert text.startswith(f"{VAL}: expected an answer from {hub.url}") and "check the network" in text
    assert not shards(site)
    assert len(bytes_asked(hub)) <= 6  # the client's own tries; ours do not multiply them


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [shard(98), shard(0)[:-500], shard(0) + b"more", b""])
def test_wrong_bytes_never_get_the_name(site, hub, wrong):
    hub.faults[ONE] = [wrong, "always"]
    text = complaint(1)
    assert text.startswith(f"{ONE}: expected ") and hub.url in text
    right, found = ("SHA-256 " + sha256(shard(1)), "SHA-256 " + sha256(wrong))
    if len(wrong) != len(shard(1)):
        right, found = ("2,024 bytes", f"{len(wrong):,} bytes")
    assert f"expected {right} " in text and f"found {found};" in text
    assert holds(site, hub, VAL) and len(bytes_asked(hub)) == 1 + fineweb.TRIES


def test_wrong_bytes_once_are_fetched_again(site, hub):
    hub.faults[ONE] = [shard(98)]
    out = fetched(1)
    assert "trying again" in out and holds(site, hub, VAL, ONE)


def test_a_file_that_the_hub_lists_and_has_not_is_one_sentence(site, hub):
    hub.faults[ONE] = [404]
    text = complaint(1)
    assert text.startswith(f"{ONE}: ") and "HTTP 404" in text and hub.url in text
    assert holds(site, hub, VAL) and len(bytes_asked(hub)) == 2


def test_a_file_that_the_hub_does_not_list_is_one_sentence(site, hub):
    text = complaint(4)
    assert f"expected fineweb_train_000004.bin at revision main, found no such file among {5}" in text
    assert not bytes_asked(hub)


def test_a_file_without_a_hash_is_one_sentence(site, hub):
    hub.without_sha = {ONE}
    assert f"expected a SHA-256 of {ONE} at revision main, found none" in complaint(1)
    assert not bytes_asked(hub)


@pytest.mark.parametrize("status, word", [(404, "no such repository"), (401, "HF_TOKEN"), (403, "HF_TOKEN")])
def test_a_refusal_is_one_sentence_at_once(site, hub, status, word):
    hub.faults["list"] = [status, "always"]
    text = complaint(1)
    assert f"HTTP {status}" in text and word in text and len(hub.asked) == 1


@pytest.mark.slow
def test_a_passing_error_of_the_hub_is_survived(site, hub):
    hub.faults = {"list": [500], VAL: [503], ONE: [500, 500]}
    out = fetched(1)
    assert "found HTTP 500; trying again" in out and holds(site, hub, VAL, ONE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list", ONE])
def test_a_lasting_error_of_the_hub_is_one_sentence(site, hub, name):
    hub.faults[name] = [500, "always"]
    text = complaint(1)
    assert "found HTTP 500; run this again later" in text and hub.url in text
    assert len([n for n, _ in hub.asked if n == name]) == fineweb.TRIES


@pytest.mark.parametrize("page", [b"<html>Welcome to the hotel</html>", b"[]", b"{}", b'{"id": "x"}'])
def test_an_answer_that_is_not_the_hubs_is_one_sentence(site, hub, page):
    hub.faults["list"] = [page, "always"]
    assert f"{fineweb.REPOSITORY}: expected " in complaint(1)


def test_a_shard_that_is_none_on_the_hub_itself_is_one_sentence(site, hub):
    hub.commits[OLD][ONE] = shard(1, count=400)
    text = complaint(1)
    assert "as the header counts 400 tokens" in text and "as the hub has it" in text
    assert holds(site, hub, VAL) and len(bytes_asked(hub)) == 2


def test_no_hub_at_all_is_one_sentence(site, hub):
    hub.close()
    text = complaint(1)
    assert text.startswith(f"{fineweb.REPOSITORY}: expected an answer from {hub.url}") and "network" in text


@pytest.mark.slow
@pytest.mark.parametrize("name, value, word", [("OFFLINE", "1", "offline"), ("ETAG_TIMEOUT", "x", "'x'")])
def test_a_client_that_may_not_or_cannot_run_is_one_sentence(site, hub, name, value, word):
    assert word in complaint(1, **{f"HF_HUB_{name}": value})
    assert not hub.asked


@pytest.mark.slow
def test_a_hub_that_is_silent_is_one_sentence(site, hub):
    hub.faults["list"] = [("stall", 0)]
    assert "Timeout" in complaint(1)


def test_a_missing_client_is_one_sentence(site, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('No module named huggingface_hub')")
    text = complaint(1, PYTHONPATH=tmp_path)
    assert "No module named huggingface_hub" in text and "pip install -r requirements.txt" in text


# ---------------------------------------------------------------------------------------------------
# Runs that are stopped


@contextmanager
def started(*arguments):
    run = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=environment(DATA_PATH=os.environ["DATA_PATH"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def wait_for_part(site, run, hub, requests=1):
    """Until the shard that stalls was asked for so often, and the client has written its first block."""
    for _ in range(3000):
        parts = list(site.glob(".fineweb_*.part")) if site.exists() else []
        asked = [name for name, _ in hub.asked].count(ONE)
        if asked == requests and parts and parts[0].stat().st_size >= WRITTEN:
            return
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    raise AssertionError("nothing was written within 30 s")


def test_a_killed_run_goes_on_where_it_was_and_leaves_nothing_behind(site, hub):
    hub.commits[OLD][ONE] = shard(1, LARGE)
    hub.faults[ONE] = [("stall", 11_000_000)] * 2
    for runs in (1, 2):
        with started(1) as run:
            wait_for_part(site, run, hub, requests=runs)
            run.send_signal(signal.SIGKILL)
        assert ONE not in shards(site) and len(shards(site)) == 2  # the other shard and one .part
    hub.asked.clear()
    part = next(site.glob(".fineweb_*.part")).stat().st_ino
    out = fetched(1)
    assert (site / ONE).stat().st_ino == part  # moved, not copied: there is no moment with half a file
    assert f"[1/2] {VAL}: already there" in out and f"{ONE}: going on at 10.5 of 12.0 MB" in out
    assert holds(site, hub, VAL, ONE) and hub.asked == [("list", OLD), (ONE, f"bytes={WRITTEN}-")]


def test_ctrl_c_is_one_sentence_and_loses_nothing(site, hub):
    hub.commits[OLD][ONE] = shard(1, LARGE)
    hub.faults[ONE] = [("stall", 11_000_000)]
    with started(1) as run:
        wait_for_part(site, run, hub)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=30)
    assert run.returncode == 130 and err.strip() == "Stopped; run this again to go on from here."
    fetched(1)
    assert holds(site, hub, VAL, ONE) and hub.asked[-1] == (ONE, f"bytes={WRITTEN}-")


@pytest.mark.slow
def test_a_damaged_rest_of_a_stopped_run_is_thrown_away(site, hub):
    fetched(1)
    for name, part in ((TWO, b"not its beginning"), (THREE, shard(3) + b"too long")):
        file = fineweb.HubFile(len(hub.commits[OLD][name]), sha256(hub.commits[OLD][name]))
        fineweb.part_of(site / name, file).write_bytes(part)
        fetched(2 if name == TWO else 3)
    assert holds(site, hub, VAL, ONE, TWO, THREE)


def test_a_hub_that_cannot_go_on_in_the_middle_starts_again(site, hub):
    hub.without_range = True
    file = fineweb.HubFile(len(shard(0)), sha256(shard(0)))
    site.mkdir(parents=True)
    fineweb.part_of(site / VAL, file).write_bytes(shard(0)[:1500])
    fetched(1)
    assert holds(site, hub, VAL, ONE) and (VAL, "bytes=1500-") in hub.asked


def test_rests_of_other_revisions_and_shards_do_not_pile_up(site, hub):
    site.mkdir(parents=True)
    for name in (ONE, TWO):
        (site / f".{name}.{'0' * 16}.part").write_bytes(b"x")
    hub.faults[VAL] = [404]
    complaint(1)
    assert not shards(site)


def test_a_second_run_into_the_same_folder_is_refused(site, hub):
    hub.commits[OLD][ONE] = shard(1, LARGE)
    hub.faults[ONE] = [("stall", 11_000_000)]
    with started(1) as run:
        wait_for_part(site, run, hub)
        assert f"{site}: expected no other run of this script" in complaint(1)
        assert run.poll() is None


# ---------------------------------------------------------------------------------------------------
# The disk


def test_a_disk_too_small_is_said_before_the_first_byte(site, hub, tmp_path):
    fetched(1)
    hub.asked.clear()
    (tmp_path / "sitecustomize.py").write_text(
        "import collections, os, shutil\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(10**9, 10**9, int(os.environ['FREE']))\n"
    )
    needed = len(shard(2, 700)) + len(shard(3))
    text = complaint(3, PYTHONPATH=tmp_path, FREE=needed - 1)
    assert text.startswith(f"{site}: expected 0.0 MB of free disk space") and "make room" in text
    assert not bytes_asked(hub) and holds(site, hub, VAL, ONE)
    file = fineweb.HubFile(len(shard(3)), sha256(shard(3)))
    fineweb.part_of(site / THREE, file).write_bytes(shard(3)[:1100])  # of a stopped run: need not fit again
    fetched(3, PYTHONPATH=tmp_path, FREE=needed - 1100)


def test_the_sentence_on_space_gives_needed_and_free(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1_500_000_000}))
    with pytest.raises(fineweb.UserError, match=r"expected 2,200\.0 MB of .* found 1,500\.0 MB; make room"):
        fineweb.check_space(tmp_path, 2_200_000_000)


def test_a_disk_that_fills_up_is_one_sentence_and_the_next_run_goes_on(site, hub):
    hub.commits[OLD][ONE] = shard(1, LARGE)
    done = subprocess.run(
        [sys.executable, SCRIPT, "1"],
        env=environment(DATA_PATH=os.environ["DATA_PATH"]),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN)),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "found: File too large; make room and run this again" in done.stderr
    fetched(1)
    assert holds(site, hub, VAL, ONE) and hub.asked[-1] == (ONE, f"bytes={WRITTEN}-")


def test_a_folder_that_cannot_be_made_is_one_sentence(site, hub):
    site.parent.write_text("a file")
    text = complaint(1)
    assert str(site.parent) in text and "Not a directory" in text and "DATA_PATH" in text
    assert site.parent.read_text() == "a file" and not hub.asked


def test_a_folder_that_may_only_be_read_serves_if_all_is_there_and_else_is_one_sentence(site, hub):
    fetched(1)
    site.chmod(0o555)
    if os.access(site, os.W_OK):
        pytest.skip("root may write everywhere")
    try:
        assert "already there" in fetched(1)
        assert "Permission denied" in complaint(2)
    finally:
        site.chmod(0o755)
