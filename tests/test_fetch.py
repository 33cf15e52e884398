"""data/cached_fineweb10B.py, with a huggingface_hub that is a fake."""

import pytest
from conftest import ROOT, launch

# Makes the file that it is asked for, and keeps what it was asked in the folder's file `asked`.
FAKE = """
import os
from pathlib import Path

def hf_hub_download(repository, name, repo_type, local_dir):
    if name == os.environ.get("FAILS_AT"):
        raise OSError("no route to host.\\nAnd more.")
    local_dir = Path(local_dir)
    local_dir.mkdir(parents=True, exist_ok=True)
    (local_dir / name).write_text("fetched")
    with open(local_dir / "asked", "a") as asked:
        print(repository, repo_type, name, file=asked)
"""
VALIDATION = "fineweb_val_000000.bin"


@pytest.fixture
def fetch(tmp_path):
    """A function that runs the script on tmp_path: (what it did, the lines that the hub was asked)."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/huggingface_hub.py").write_text(FAKE)

    def run(*arguments, script=ROOT / "data/cached_fineweb10B.py", **changes):
        changes = dict(DATA_PATH=tmp_path, PYTHONPATH=tmp_path / "packages") | changes
        done = launch(*arguments, script=script, cwd=tmp_path / "packages", **changes)
        asked = tmp_path / "data/fineweb10B/asked"
        return done, asked.read_text().splitlines() if asked.exists() else []

    return run


def training(count):
    return [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]


@pytest.mark.parametrize("arguments, count", [([], 10), ([1], 1), ([103], 103)])
def test_it_fetches_the_validation_shard_and_the_first_n_training_shards(fetch, arguments, count):
    done, asked = fetch(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert asked == [f"kjj0/fineweb10B-gpt2 dataset {name}" for name in [VALIDATION, *training(count)]]


def test_without_data_path_they_lie_where_train_gpt_looks_for_them(fetch, tmp_path):
    script = tmp_path / "data/cached_fineweb10B.py"
    script.parent.mkdir()
    script.write_bytes((ROOT / "data/cached_fineweb10B.py").read_bytes())
    done, _ = fetch(1, script=script, DATA_PATH=None)
    assert done.returncode == 0
    found = {path.name for path in (tmp_path / "data/fineweb10B").glob("*.bin")}
    assert found == {VALIDATION, *training(1)}


@pytest.mark.parametrize("count", [0, 104, -1, "many"])
def test_a_number_of_shards_that_there_is_not_is_refused(fetch, count):
    done, asked = fetch(count)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("cached_fineweb10B.py: error: ")
    assert asked == []


def test_a_shard_that_is_there_is_kept_and_not_asked_for(fetch, tmp_path):
    folder = tmp_path / "data/fineweb10B"
    folder.mkdir(parents=True)
    (folder / training(2)[1]).write_text("mine")
    done, asked = fetch(2)
    assert done.returncode == 0 and f"[3/3] {training(2)[1]}: already there\n" in done.stdout
    assert [line.split()[-1] for line in asked] == [VALIDATION, training(1)[0]]
    assert (folder / training(2)[1]).read_text() == "mine"


def test_a_failure_is_one_sentence_with_exit_code_1_and_the_next_run_goes_on(fetch):
    done, asked = fetch(2, FAILS_AT=training(1)[0])
    assert done.returncode == 1 and len(asked) == 1
    assert done.stderr == (
        f"{training(1)[0]}: could not be fetched from kjj0/fineweb10B-gpt2: no route to host. "
        "Run this again to go on.\n"
    )
    done, asked = fetch(2)
    assert done.returncode == 0 and [line.split()[-1] for line in asked] == [VALIDATION, *training(2)]


def test_without_huggingface_hub_it_says_what_to_install(fetch, tmp_path):
    (tmp_path / "packages/huggingface_hub.py").write_text("raise ImportError")
    done, _ = fetch(1)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "huggingface_hub is not installed; pip install -r requirements.txt\n"
