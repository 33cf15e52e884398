"""data/cached_fineweb10B.py, against a stand-in for the hub's client."""

import hashlib
import struct
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "data"))
import cached_fineweb10B as fineweb  # noqa: E402

VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


def shard(token, magic=20240520, count=10):
    return struct.pack("<256i", magic, 1, count, *[0] * 253) + bytes([token, 0] * 10)


class Hub:
    """Serves `files` as huggingface_hub does. `listed`: what it describes; `asked`: downloads."""

    def __init__(self):
        self.files = {VAL: shard(0), ONE: shard(1), TWO: shard(2)}
        self.listed, self.asked, self.main = dict(self.files), [], "commit 1"

    def dataset_info(self, repository, revision, files_metadata):
        assert repository == fineweb.REPOSITORY and files_metadata
        lfs = {name: SimpleNamespace(size=len(content), sha256=hashlib.sha256(content).hexdigest())
               for name, content in self.listed.items()}
        siblings = [SimpleNamespace(rfilename=name, lfs=about) for name, about in lfs.items()]
        return SimpleNamespace(sha=self.main if revision == "main" else revision,
                               siblings=[SimpleNamespace(rfilename="README.md", lfs=None), *siblings])

    def hf_hub_download(self, repository, name, repo_type, revision, local_dir):
        assert (repository, repo_type) == (fineweb.REPOSITORY, "dataset")
        self.asked.append((name, revision))
        local_dir.mkdir(exist_ok=True)
        if isinstance(self.files[name], BaseException):
            (local_dir / "half").touch()
            raise self.files[name]
        (local_dir / name).write_bytes(self.files[name])
        return str(local_dir / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    return hub


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "fineweb10B"


@pytest.fixture
def refused(capsys):
    """A function that runs the script and returns the one sentence with which it fails."""

    def call(*arguments, code=1):
        assert fineweb.main(list(arguments)) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    return call


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_it_fetches_the_validation_shard_and_the_first_n_and_a_second_run_asks_nobody(hub, folder):
    assert fineweb.main(["1"]) == 0
    assert shards(folder) == {VAL: shard(0), ONE: shard(1)} and not (folder / ".partial").exists()
    hub.main = "commit 2"
    assert fineweb.main(["2"]) == 0 and shards(folder) == hub.files
    assert hub.asked == [(VAL, "commit 1"), (ONE, "commit 1"), (TWO, "commit 1")]
    hub.listed = None
    assert fineweb.main(["2"]) == 0


@pytest.mark.parametrize("content", [b"", shard(1)[:-2], shard(1, magic=1), shard(1, count=11)])
def test_a_damaged_shard_is_fetched_again(hub, folder, content):
    folder.mkdir(parents=True)
    (folder / VAL).write_bytes(shard(0))
    (folder / ONE).write_bytes(content)
    assert fineweb.main(["1"]) == 0
    assert shards(folder)[ONE] == shard(1) and [name for name, _ in hub.asked] == [ONE]


def test_a_download_with_another_sha256_gets_no_name(hub, folder, refused):
    hub.files[ONE] = shard(3)
    assert refused("1").startswith(f"{ONE}: expected SHA-256 {hashlib.sha256(shard(1)).hexdigest()} as ")
    assert shards(folder) == {VAL: shard(0)}


@pytest.mark.parametrize("error, code, said", [
    (ConnectionError("no route\nto host"), 1, "found: no route; check the network"),
    (OSError(28, "No space left on device"), 1, "No space left on device; check"),
    (KeyboardInterrupt(), 130, "Stopped; run this again to go on from here."),
])
def test_after_an_interruption_the_next_run_fetches_the_rest(hub, folder, refused, error, code, said):
    hub.files[ONE] = error
    assert said in refused("1", code=code) and shards(folder) == {VAL: shard(0)}
    hub.files[ONE] = shard(1)
    assert fineweb.main(["1"]) == 0
    assert [name for name, _ in hub.asked] == [VAL, ONE, ONE] and not (folder / ".partial").exists()


def test_what_cannot_be_fetched_is_said_before_anything_is(hub, folder, refused, monkeypatch):
    """Without a number it is ten shards, which the stand-in does not have."""
    assert refused().startswith("fineweb_train_000003.bin: expected it in kjj0/fineweb10B-gpt2 at main, ")
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: SimpleNamespace(free=2000))
    assert f"{folder}: expected 0.0 MB of free disk space, found 0.0 MB; make room" in refused("1")
    monkeypatch.setenv("DATA_PATH", str(folder / "none"))
    assert refused("1").startswith("DATA_PATH: expected a folder, found none at ")
    for wrong in ("0", "104", "ten"):
        with pytest.raises(SystemExit, match="2"):
            fineweb.main([wrong])
    assert not hub.asked


def test_without_the_client_or_a_network_it_is_one_sentence(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('No module named huggingface_hub')")
    for env in (dict(PYTHONPATH=tmp_path), dict(HF_HUB_OFFLINE=1)):
        done = subprocess.run([sys.executable, str(ROOT / "data" / "cached_fineweb10B.py"), "1"],
                              env=environment(DATA_PATH=tmp_path, **env), capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert "expected to fetch kjj0/fineweb10B-gpt2 from the hub" in done.stderr
