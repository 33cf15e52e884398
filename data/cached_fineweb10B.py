"""
Fetch FineWeb as GPT-2 tokens: the validation shard and the first N training shards of 100M tokens each.

    python data/cached_fineweb10B.py [N] [--revision REVISION]

N goes from 1 to 103. Without it: as many as the speedrun needs, or a run of NUM_ITERATIONS steps of
BATCH_TOKENS tokens where the environment sets these. A shard takes 200 MB. The shards go to data/fineweb10B
below DATA_PATH, or below this checkout.

A shard gets its name only after its SHA-256, size and header were found right; until then it is a hidden
.part file, at whose end the next run goes on. Shards that are right are kept, damaged ones are replaced.
`verified.json` beside them remembers what was verified: a run that finds everything there asks nobody.

The revision is pinned. The first run into a folder resolves `main` of the dataset to its commit and writes
that into verified.json; later runs into that folder take the same commit, whatever main has become.
--revision takes another commit, branch or tag and pins its commit instead; `--revision main` moves on.

Exit codes: 0 all there; 1 network, hub, disk or data; 2 wrong argument or setting; 130 stopped by Ctrl-C.
It needs huggingface_hub, whose settings hold here too (HF_ENDPOINT for a mirror, HF_TOKEN, proxies).
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

REPOSITORY = "kjj0/fineweb10B-gpt2"
REVISION = "main"  # of the first run into a folder, which pins the commit that it finds there
NUM_SHARDS = 103  # of training, in the repository
SPEEDRUN = {"NUM_ITERATIONS": 1705, "BATCH_TOKENS": 393_216}  # the defaults of train_gpt.py

HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1  # of a token shard; uint16 tokens follow the header

TRIES = 3  # of a request that failed in a way that may pass
PAUSE = 1.0  # s between them
ANSWER_TIMEOUT = 10.0  # s for the hub's list of files; for downloads: HF_HUB_DOWNLOAD_TIMEOUT, 10 s too


class UserError(Exception):
    """A problem as one sentence; `exit_code` is 2 for arguments and settings, 1 for everything else."""

    def __init__(self, problem: str, exit_code: int = 1):
        super().__init__(problem)
        self.exit_code = exit_code


class Failure(Exception):
    """A request that failed: what was expected, what was found, what to do; whether it may pass by itself."""

    def __init__(self, expected: str, found: str, remedy: str, may_pass: bool):
        self.sentence = f"expected {expected}, found {found}; {remedy}."
        self.found, self.may_pass = found, may_pass


class HubFile(NamedTuple):
    """What the hub says of a file."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


# ----------------------------------------------------------------------------------------------------
# How many shards


def shards_needed(steps: int, batch_tokens: int) -> int:
    """Training shards that feed `steps` steps of `batch_tokens` tokens in one pass.

    Batches drop the rests of cut documents. How much that is, the published speedrun of September 2025
    measured: nine shards (900M tokens) lasted for about 1,697 steps of 393,216 tokens, so 74.1 % of the
    tokens are used. Its loader also lost an unfinished batch at each shard's end, 0.4 % at most, which
    train_gpt.py does not; so the result is rather a shard too high than one too low.
    """
    used_of_nine = 1697 * 393_216  # tokens; in whole numbers, for an exact result at the edges
    return -(-9 * steps * batch_tokens // used_of_nine)


def whole_number(name: str, text: str, most: int) -> int:
    """`text` as a number of 1 to `most`. Raises UserError (exit code 2)."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if 1 <= number <= most:
        return number
    raise UserError(f"{name}: expected a whole number of 1 to {most:,}, found {text!r}.", exit_code=2)


def planned_shards(environ) -> int:
    """Training shards for the run that the environment describes. Raises UserError (exit code 2)."""
    steps, batch_tokens = (
        whole_number(name, environ.get(name, str(default)), 2**31 - 1) for name, default in SPEEDRUN.items()
    )
    needed = shards_needed(steps, batch_tokens)
    plan = f"{steps:,} steps of {batch_tokens:,} tokens need {needed:,} training shard{'s' * (needed > 1)}"
    if needed > NUM_SHARDS:
        plan += f"; the repository has {NUM_SHARDS}, so set EPOCHS={-(-needed // NUM_SHARDS)} in training"
    print(plan, flush=True)
    return min(needed, NUM_SHARDS)


# ----------------------------------------------------------------------------------------------------
# Files on disk: what makes a shard right, and what is remembered of it


def size_of(path: Path) -> int:
    """Bytes; 0 where there is no file."""
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def shard_problem(path: Path) -> str:
    """What is wrong with a token shard's header or size, as 'expected ..., found ...'; '' if nothing is."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        return f"expected {HEADER_BYTES:,} bytes of header, found {size:,} bytes in all"
    with open(path, "rb") as file:
        magic, version, tokens = struct.unpack("<3i", file.read(12))
    if (magic, version) != (MAGIC, VERSION):
        return f"expected magic number {MAGIC} and version {VERSION}, found {magic} and {version}"
    if tokens < 1:
        return f"expected a count of at least 1 token in the header, found {tokens}"
    if size != HEADER_BYTES + 2 * tokens:
        expected = HEADER_BYTES + 2 * tokens
        return f"expected {expected:,} bytes, as the header counts {tokens:,} tokens, found {size:,}"
    return ""


class Verified:
    """verified.json beside the shards: the pinned commit, and the SHA-256 of each file found right at it.

    A file counts as verified while its size and the time of its last change are what they were then, so
    that a second run need not read gigabytes. `commit` is None until a first run has pinned one.
    """

    def __init__(self, folder: Path):
        self.path, self.commit, self.files = folder / "verified.json", None, {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if not re.fullmatch("[0-9a-f]{40}", content["revision"]):
                raise ValueError
            self.commit, self.files = content["revision"], dict(content["files"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            print(f"{self.path}: damaged; pinning the revision and verifying the files anew", flush=True)

    @staticmethod
    def entry(path: Path, sha256: str) -> dict:
        stat = path.stat()
        return {"sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}

    def sha256(self, path: Path) -> str:
        """The file's SHA-256 if it was verified and has not changed since, else ''."""
        known = self.files.get(path.name)
        sha256 = known.get("sha256", "") if isinstance(known, dict) else ""
        return sha256 if path.is_file() and known == self.entry(path, sha256) else ""

    def pin(self, commit: str):
        """Another commit may hold other files: what was verified at the old one counts no more."""
        if commit != self.commit:
            self.commit, self.files = commit, {}
            self.save()

    def add(self, path: Path, sha256: str):
        self.files[path.name] = self.entry(path, sha256)
        self.save()

    def save(self):
        content = {"repository": REPOSITORY, "revision": self.commit, "files": self.files}
        beside = self.path.with_suffix(".json.part")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


@contextmanager
def only_run(folder: Path):
    """Holds the folder against other runs of this script, which would write into the same .part files."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: expected no other run of this script, found one that is fetching into this "
                "folder; wait until it has ended."
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def disk_problem(error: OSError, folder: Path) -> UserError:
    """The sentence for an error of the file system."""
    remedy = "correct it, or set DATA_PATH to a folder where you may write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room and run this again, which goes on where it stopped"
    where = error.filename or folder
    return UserError(f"{where}: expected to read and write here, found: {error.strerror or error}; {remedy}.")


# ----------------------------------------------------------------------------------------------------
# The hub


class Hub:
    """The dataset repository at one commit, through huggingface_hub.

    `files` maps names to what the hub says of them. Every method raises UserError for whatever fails.
    """

    def __init__(self, revision: str, names: list[str]):
        # The client's warnings of each failed try would bury our one sentence.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        try:
            import huggingface_hub
            from huggingface_hub.file_download import http_get
        except Exception as error:  # also for a wrong value in one of the client's own variables
            raise UserError(f"huggingface_hub: expected the package, version 0.34 or newer, found {error}; "
                            "python -m pip install -r requirements.txt.") from None
        self.client, self.http_get, self.revision = huggingface_hub, http_get, revision
        self.endpoint = huggingface_hub.constants.ENDPOINT
        self.commit, self.files = self.persist(REPOSITORY, lambda: self.list_files(names))

    def list_files(self, names: list[str]) -> tuple[str, dict[str, HubFile]]:
        """The commit and the named files. Raises Failure, or an exception of the client."""
        info = self.client.HfApi().dataset_info(
            REPOSITORY, revision=self.revision, files_metadata=True, timeout=ANSWER_TIMEOUT
        )
        there = {entry.rfilename: entry for entry in info.siblings or []}
        remedy = "check the repository, or take another revision with --revision"
        if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
            raise Failure(f"the commit of revision {self.revision}", f"{info.sha!r}", remedy, False)
        missing = [name for name in names if name not in there]
        if missing:
            found = f"no such file among {len(there):,}"
            raise Failure(f"{missing[0]} at revision {self.revision}", found, remedy, False)
        for name in names:  # the hash becomes part of a file's name, so it must look like one
            lfs = there[name].lfs
            if not (lfs and re.fullmatch("[0-9a-f]{64}", str(lfs.sha256))):
                raise Failure(f"a SHA-256 of {name} at revision {self.revision}", "none", remedy, False)
        return info.sha, {name: HubFile(there[name].lfs.size, there[name].lfs.sha256) for name in names}

    def download(self, name: str, part: Path):
        """Complete `part`, from its present end on. Raises Failure, or OSError of the disk.

        http_get and not hf_hub_download, which in recent versions throws away what an interrupted run had
        got; this goes on from there, across runs as well as across cut connections.
        """
        file, have = self.files[name], size_of(part)
        if have < file.size:
            url = self.client.hf_hub_url(REPOSITORY, name, repo_type="dataset", revision=self.commit)
            # A server that compresses ignores the range from which to go on.
            headers = self.client.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
            try:
                with open(part, "ab") as stream:
                    self.http_get(url, stream, resume_size=have, headers=headers, displayed_filename=name)
                    stream.flush()
                    os.fsync(stream.fileno())  # after a power cut, no hollow file under the final name
            except Exception as error:
                # After a cut the client goes on by itself, up to five times in vain: more only if bytes came.
                raise self.explain(error, worth_more=size_of(part) > have) from None
            finally:
                if part.exists() and not size_of(part):
                    part.unlink()
        expected, found = f"{file.size:,} bytes", f"{size_of(part):,} bytes"
        if expected == found:
            expected, found = f"SHA-256 {file.sha256}", f"SHA-256 {sha256_of(part)}"
        if expected != found:
            part.unlink(missing_ok=True)
            remedy = "what was there before is untouched; run this again later or over another network"
            raise Failure(f"{expected} as {self.endpoint} announces", found, remedy, True)

    def persist(self, what: str, call):
        """call(), up to TRIES times while a failure may pass. Raises UserError about `what`."""
        for tries_left in reversed(range(TRIES)):
            try:
                return call()
            except Exception as error:  # of any kind: the client's depend on its version and HTTP library
                failure = self.explain(error)
                if not (failure.may_pass and tries_left):
                    raise UserError(f"{what}: {failure.sentence}") from None
                print(f"{what}: found {failure.found}; trying again", flush=True)
                time.sleep(PAUSE)

    def explain(self, error: Exception, worth_more: bool = True) -> Failure:
        """The Failure behind an exception of the client. Raises those of the local file system again.

        `worth_more` says whether a line that failed is worth another try.
        """
        if isinstance(error, Failure):
            return error
        status = getattr(getattr(error, "response", None), "status_code", None)
        of_network = status is not None or isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, OSError) and error.errno and not of_network:
            raise error
        where = f"an answer from {self.endpoint} at revision {self.revision}"
        if status in (401, 403):
            remedy = "correct or unset HF_TOKEN, and check that the repository is public"
            return Failure(where, f"HTTP {status}, access refused", remedy, False)
        if status == 404:
            remedy = "check HF_ENDPOINT, or take another revision with --revision main"
            return Failure(where, "HTTP 404, no such repository, revision or file", remedy, False)
        if status:
            may_pass = status in (408, 429) or status >= 500
            return Failure(where, f"HTTP {status}", "run this again later", may_pass)
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        found = f"{type(error).__name__}: {reason}"
        remedy = "check the network, proxy and HF_ENDPOINT and run this again, which goes on where it stopped"
        # A time-out was long enough; what cannot be read is some other server's answer.
        hopeless = "Timeout" in found or isinstance(error, (ValueError, KeyError, TypeError, AttributeError))
        return Failure(where, found, remedy, worth_more and not hopeless)


# ----------------------------------------------------------------------------------------------------
# Run


def part_of(path: Path, file: HubFile) -> Path:
    """Where a shard grows: beside its final place, and named by its content, so that two cannot mix."""
    return path.with_name(f".{path.name}.{file.sha256[:16]}.part")


def remove_parts(folder: Path, keep: Path | None = None):
    for part in folder.glob(".fineweb_*.part"):
        if part != keep:
            part.unlink()


def judge(path: Path, file: HubFile, verified: Verified) -> str:
    """'' for a shard that is right, 'missing', or what is wrong with it. Hashes it once and remembers."""
    if not path.exists():
        return "missing"
    problem = shard_problem(path)
    if problem or verified.sha256(path) == file.sha256:
        return problem
    print(f"{path.name}: comparing its SHA-256 with the hub's", flush=True)
    found = sha256_of(path)
    if found != file.sha256:
        return f"expected SHA-256 {file.sha256}, found {found}"
    verified.add(path, found)
    return ""


def check_space(folder: Path, needed: int):
    """Raises UserError where the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: expected {needed / 1e6:,.1f} MB of free disk space for what is missing, found "
            f"{free / 1e6:,.1f} MB; make room, ask for fewer shards, or set DATA_PATH to another disk."
        )


def fetch(hub: Hub, path: Path, label: str):
    """Fetch one shard, verify it and put it in place. Raises UserError."""
    file = hub.files[path.name]
    part = part_of(path, file)
    remove_parts(path.parent, keep=part)  # one at most is left by a stopped run, of whatever revision
    if have := size_of(part):
        print(f"{label}: going on at {have / 1e6:,.1f} of {file.size / 1e6:,.1f} MB", flush=True)
    hub.persist(path.name, lambda: hub.download(path.name, part))
    problem = shard_problem(part)
    if problem:  # these are the bytes that the hub has: to fetch them again cannot help
        part.unlink()
        raise UserError(f"{path.name}: {problem}, in the file as the hub has it; take another revision with "
                        "--revision.")
    os.replace(part, path)


def fetch_missing(folder: Path, names: list[str], revision: str | None) -> Verified:
    """Bring the named shards into the folder, with a line for each. Raises UserError, OSError."""
    verified = Verified(folder)
    hub = Hub(revision or verified.commit or REVISION, names)
    verified.pin(hub.commit)
    problems = {name: judge(folder / name, hub.files[name], verified) for name in names}
    to_fetch = {folder / name: hub.files[name] for name in names if problems[name]}
    check_space(folder, sum(max(0, f.size - size_of(part_of(path, f))) for path, f in to_fetch.items()))
    for i, name in enumerate(names, start=1):
        label = f"[{i}/{len(names)}] {name}"
        if not problems[name]:
            print(f"{label}: already there", flush=True)
            continue
        if problems[name] != "missing":
            print(f"{label}: damaged, fetching again ({problems[name]})", flush=True)
        fetch(hub, folder / name, label)
        verified.add(folder / name, hub.files[name].sha256)
        print(f"{label}: fetched", flush=True)
    remove_parts(folder)
    return verified


def run(folder: Path, count: int, revision: str | None):
    """The validation shard and `count` training shards, verified, in `folder`. Raises UserError, OSError."""
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    verified = Verified(folder)
    if revision in (None, verified.commit) and all(verified.sha256(folder / name) for name in names):
        for i, name in enumerate(names, start=1):
            print(f"[{i}/{len(names)}] {name}: already there")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with only_run(folder):
            verified = fetch_missing(folder, names, revision)
    tokens = sum((size_of(folder / name) - HEADER_BYTES) // 2 for name in names[1:])
    where = f"DATA_PATH={shlex.quote(os.environ['DATA_PATH'])} " if os.environ.get("DATA_PATH") else ""
    print(f"{folder}: validation shard and {count} training shard{'s' * (count > 1)} of {tokens:,} tokens, "
          f"verified at commit {verified.commit}; next: {where}./run.sh")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    help_count = f"training shards, 1 to {NUM_SHARDS} (default: as many as the planned steps need)"
    parser.add_argument("shards", nargs="?", metavar="N", help=help_count)
    help_revision = "commit, branch or tag of the dataset (default: the commit pinned in the folder, or main)"
    parser.add_argument("--revision", help=help_revision)
    arguments = parser.parse_args()
    root = Path(os.environ.get("DATA_PATH") or Path(__file__).resolve().parent.parent)
    folder = root / "data" / "fineweb10B"
    try:
        if not root.is_dir():
            problem = f"DATA_PATH: expected a folder, found none at {root}; correct it, or make the folder."
            raise UserError(problem, exit_code=2)
        given = arguments.shards
        count = planned_shards(os.environ) if given is None else whole_number("N", given, NUM_SHARDS)
        run(folder, count, arguments.revision or None)
    except OSError as error:
        print(disk_problem(error, folder), file=sys.stderr)
        return 1
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped; run this again to go on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
