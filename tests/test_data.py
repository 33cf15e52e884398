"""Shards, the packing of documents into training batches, the loader's thread, and validation."""

import gzip
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from conftest import CPU, SMALL, Run, before, fresh_model, overrides, ran, random_documents, stage_of
from conftest import write_shard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import UserError

BOS = SMALL["bos_id"]


# ---- Shards that are wrong, and data that do not suffice

def read_data(s):
    """What a run reads before step 0: the validation tokens and the plan."""
    val_tokens, shards = train_gpt.read_validation(s), train_gpt.open_shards(s, "train_files")
    return val_tokens, train_gpt.plan_packing(shards, s, train_gpt.make_schedule(s), 8)


def complaint(s):
    with pytest.raises(UserError) as error:
        read_data(s)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    return str(error.value)


GOOD, NO_BRACKETS = [BOS, 1, 2, 3], str.maketrans("", "", "[]")
SHARD = "a token shard, which begins with [20240520, 1]"
HEADERLESS = "token ids of {} bits without a header, as of nanoGPT and old versions of llm.c"
OTHER = "a file of another kind, which begins with the bytes "
IDS = np.arange(1000) * 37 % 50_257
WRONG = {  # how a shard's bytes are got from a good one's; what the message says was expected, and found
    "empty file": (lambda good: b"", SHARD, "an empty file"),
    "header cut": (lambda good: good[:500], "a header of 1,024 bytes", "500"),
    "wrong magic": (lambda good: b"x" + good[1:], SHARD, OTHER + "78 d8 34 01 01 00 00 00"),
    "wrong version": (lambda good: good[:4] + b"\2" + good[5:], SHARD, "a shard of version 2"),
    "count too large": (lambda good: good[:8] + b"\5" + good[9:], "1,034 bytes for 5 tokens",
                        "1,032, as of a file that was cut"),
    "count too small": (lambda good: good[:8] + b"\3" + good[9:], "1,030 bytes for 3 tokens", "1,032"),
    "a token lost": (lambda good: good[:-2], "1,032 bytes", "1,030, as of a file that was cut"),
    "odd byte count": (lambda good: good + b"\0", "1,032 bytes", "1,033"),
    "no tokens": (lambda good: good[:8] + b"\0" + good[9:1024], "1 token", "0"),
    "id out of range": (lambda good: good[:-2] + b"\x32\0", "ids below VOCAB_SIZE=50", "50 at token 3"),
    # files of another kind
    "32 bits": (lambda good: good + b"\0" * 8, "1,032 bytes", "1,040, as for ids of 32 bits"),
    "Llama 3": (lambda good: (20240801).to_bytes(4, "little") + good[4:], SHARD,
                "a shard of llm.c for Llama 3, with ids of 32 bits"),
    "16 bits": (lambda good: IDS.astype("<u2").tobytes(), SHARD, HEADERLESS.format(16)),
    "few ids": (lambda good: (IDS % 65).astype("<u2").tobytes(), SHARD, HEADERLESS.format(16)),
    "headerless 32": (lambda good: IDS.astype("<u4").tobytes(), SHARD, HEADERLESS.format(32)),
    "npy": (lambda good: b"\x93NUMPY\1\0" + good, SHARD, "a NumPy file"),
    "gzip": (lambda good: gzip.compress(good), SHARD, "a gzip file"),
    "magic alone": (lambda good: good[:4], SHARD, OTHER + "88 d8 34 01"),
    "text": (lambda good: "Größe\n".encode(), SHARD, "text"),
    "zeros": (lambda good: b"\0" * 1024 + good[1024:], SHARD, OTHER + "00 00 00 00 00 00 00 00"),
    "noise": (lambda good: bytes(range(255))[::-1] * 4, SHARD, OTHER + "fe fd fc fb fa f9 f8 f7"),
}


@pytest.mark.parametrize("file", ["train_0.bin", "val_0.bin"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_shard_is_one_sentence_with_file_expected_found_and_remedy(data, tmp_path, wrong, file):
    """It never says that the file, which may be the only copy, is of no use."""
    spoil, expected, found = WRONG[wrong]
    path = write_shard(tmp_path / file, GOOD)
    path.write_bytes(spoil(path.read_bytes()))
    text, remedy = complaint(data).split("; ", 1)
    assert text.startswith(f"{path}: expected ")
    said_expected, said_found = text.split(": expected ", 1)[1].split(", found ")
    assert expected in said_expected and said_found.translate(NO_BRACKETS) == found.translate(NO_BRACKETS)
    assert said_found not in said_expected.split(), "it found what it expected"
    if "VOCAB" in expected:
        assert remedy.startswith("set PRESET, or VOCAB_SIZE and BOS_ID, to match these files")
    else:
        assert "python data/tokenize_text.py" in remedy
    assert remedy.endswith("or name other files.") and not re.search("delete|remove", remedy)


@pytest.mark.parametrize("file", ["train_0.bin", "val_0.bin", "val_00.bin"])
def test_shards_of_another_vocabulary_without_a_document_are_one_sentence(data, tmp_path, file):
    """Also a second validation shard of which the run needs few tokens."""
    write_shard(tmp_path / "val_0.bin", [BOS] * (256 if file == "val_00.bin" else 257))
    path = write_shard(tmp_path / file, [1, 2, 3] * 100)
    expected = f"{path}: expected documents that open with BOS_ID=49, found no such token; set PRESET, or VOC"
    assert complaint(data).startswith(expected)


@pytest.mark.parametrize("place", [0, 41, (1 << 22) - 1, 1 << 22, (1 << 22) + 17])
def test_an_id_out_of_range_is_found_at_any_token(data, tmp_path, place):
    """Also where no batch would take it, and in a shard that is read in several parts."""
    tokens = np.ones((1 << 22) + 18, dtype=np.uint16)
    tokens[[0, place]] = BOS, 65_535
    tokens[1:1_000_000:30] = BOS
    path = write_shard(tmp_path / "train_0.bin", tokens)
    expected = f"{path}: expected ids below VOCAB_SIZE=50, found 65535 at token {place:,};"
    assert complaint(data).translate(NO_BRACKETS).startswith(expected)


@pytest.mark.parametrize("name", ["train_files", "val_files"])
def test_a_pattern_without_a_match_is_one_sentence(data, tmp_path, name):
    """A folder is no match."""
    (tmp_path / "none_1.bin").mkdir()
    pattern = tmp_path / "none_*.bin"
    assert complaint(replace(data, **{name: str(pattern)})) == (
        f"{name.upper()}: expected token shards at {pattern}, found none; correct it, unset it, or fetch "
        "FineWeb with python data/cached_fineweb10B.py."
    )


def test_a_run_that_is_not_fed_ends_before_step_0_with_the_numbers(data, tmp_path, run_main):
    write_shard(tmp_path / "train_0.bin", [BOS, *[1] * 39] * 30)  # 1,200 tokens; 16 documents a step
    code, shown, said = run_main(**overrides(data))
    assert (code, shown) == (1, "") and not (tmp_path / "logs").exists()
    assert said == (
        "TRAIN_FILES: expected documents for NUM_ITERATIONS=6 steps of 512 tokens, found 1,200 tokens in 1 "
        "shard, in 1 pass enough for 1 step; raise EPOCHS or add text (python data/tokenize_text.py, or for "
        "FineWeb python data/cached_fineweb10B.py).\n"
    )
    for changes in (dict(num_iterations=1), dict(epochs=5)):
        read_data(replace(data, **changes))


@pytest.mark.parametrize("lengths", [[100_000], [5000] * 5, [2] * 30 + [100_000]])
def test_long_documents_are_told_with_what_can_be_used_of_them_and_passes_are_no_advice(tmp_path, lengths):
    """Where passes are set, which take the same tokens again and again, it is a warning."""
    usable = sum(min(length, 30) for length in lengths)
    expected = (f"only {usable:,} of {sum(lengths):,} tokens can be used ({usable / sum(lengths):.1%}), "
                "the same ones in every pass, since a run uses at most 30 tokens of a document, from "
                "BOS_ID=49 on; cut long documents, as python data/tokenize_text.py does, or raise "
                "MAX_SEQ_LEN and BATCH_TOKENS")
    with pytest.raises(UserError, match="enough for 0 steps;") as error:
        Corpus(tmp_path, [lengths], microbatch_tokens=40, longest=30).plan(2)
    assert str(error.value).endswith(f"; {expected}.")
    plan = Corpus(tmp_path, [lengths], microbatch_tokens=40, longest=30, epochs=100).plan(2)
    assert plan.summary.splitlines()[1] == f"data: WARNING: {expected}"


def test_text_for_less_than_a_step_is_told_without_advice_to_repeat_it(tmp_path):
    with pytest.raises(UserError, match="enough for 0 steps; add text "):
        Corpus(tmp_path, [[20] * 3], microbatch_tokens=40, longest=30).plan(2)


def test_too_few_validation_tokens_are_counted_over_all_shards(data, tmp_path):
    write_shard(tmp_path / "val_0.bin", [BOS] * 200)
    write_shard(tmp_path / "val_1.bin", [BOS] * 56)
    assert complaint(data) == ("VAL_FILES: expected VAL_TOKENS + 1 = 257 tokens, found 256; lower VAL_TOKENS "
                               "or add shards.")
    write_shard(tmp_path / "val_1.bin", [BOS] * 57)
    read_data(data)


def test_shards_are_taken_in_name_order_and_validation_goes_on_across_them(data, tmp_path):
    texts = [np.concatenate(random_documents(seed, 4, longest=70)) for seed in (5, 6, 7)]
    for name, tokens in zip(("val_2", "val_0", "val_1"), texts):
        write_shard(tmp_path / f"{name}.bin", tokens)
    for name in ("train_1", "train_00"):
        write_shard(tmp_path / f"{name}.bin", texts[0])
    val_tokens, plan = read_data(data)
    assert [shard.path.name for shard in plan.shards] == ["train_0.bin", "train_00.bin", "train_1.bin"]
    whole = np.concatenate([texts[1], texts[2], texts[0]])
    assert len(texts[1]) < 257 < len(whole) and val_tokens.tolist() == whole[:257].tolist()


# ---- Training batches, against a packer of lists

def pack(shards, microbatch_tokens, longest, epochs=1):
    """Microbatches as (pieces, documents passed so far), from shards as lists of documents (lists of ids)."""
    documents = [document for shard in shards for document in shard] * epochs
    microbatches, passed = [], 0
    while True:
        room, pieces = microbatch_tokens + 1, []
        while room and passed < len(documents):
            piece = documents[passed][: min(longest, room)]
            pieces, room, passed = pieces + [piece], room - len(piece), passed + 1
        if room:
            return microbatches
        microbatches.append((pieces, passed))


class Corpus:
    """Shards on disk, as lists of documents' lengths, with `junk` tokens before each one's first BOS."""

    def __init__(self, folder, lengths, microbatch_tokens, longest, junk=(0, 0, 0), epochs=1):
        rng = np.random.default_rng(0)

        def draw(n):
            return rng.integers(0, BOS, size=n).tolist()

        self.shards = [[[BOS, *draw(length - 1)] for length in shard] for shard in lengths]
        files = dict(train_files=str(Path(folder) / "*.bin"), max_seq_len=(longest,), epochs=epochs)
        files["batch_tokens"] = (8 * microbatch_tokens,)
        self.s = replace(train_gpt.Settings(), **SMALL | files)
        for i, (shard, before_first) in enumerate(zip(self.shards, junk)):
            write_shard(Path(folder) / f"{i}.bin", sum(shard, draw(before_first)))

    def pack(self, num_microbatches=8):
        """What a plain packer makes of it, cut to whole steps."""
        [batch_tokens], [longest] = self.s.batch_tokens, self.s.max_seq_len
        found = pack(self.shards, batch_tokens // num_microbatches, longest, self.s.epochs)
        return found[: len(found) // num_microbatches * num_microbatches]

    def plan(self, steps, num_microbatches=8):
        s = replace(self.s, num_iterations=steps, window_schedule=(2,))  # one stage
        shards, schedule = train_gpt.open_shards(s, "train_files"), train_gpt.make_schedule(s)
        return train_gpt.plan_packing(shards, s, schedule, num_microbatches)

    def batches(self, steps, world_size=1, first_step=0):
        """The generators of all ranks."""
        plan = self.plan(steps, max(8, world_size))
        numbers = [train_gpt.microbatches_of_rank(plan, first_step, rank, world_size)
                   for rank in range(world_size)]
        return [train_gpt.train_batches(plan, own, CPU, rank) for rank, own in enumerate(numbers)]

    def check(self, world_size=1):
        """That the batches of all ranks, in the order of the microbatches, are those of the plain packer."""
        expected = self.pack(max(8, world_size))
        steps = len(expected) // max(8, world_size)
        ranks = self.batches(steps, world_size)
        found = [next(batches) for _ in expected[::world_size] for batches in ranks]
        assert len({batch.cu_seqlens.shape for batch in found}) == 1, "the shapes are not static"
        for batch, (pieces, _) in zip(found, expected):
            assert_batch_is(batch, pieces)
        with pytest.raises(UserError, match=f"enough for {train_gpt.counted(steps, 'step')};"):
            self.plan(steps + 1, max(8, world_size))
        return found


def assert_batch_is(batch, pieces):
    """Inputs, shifted targets and padded piece starts of one microbatch."""
    tokens = sum(pieces, [])
    num_tokens = len(tokens) - 1
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    starts = [start for start in starts if start < num_tokens]
    assert [x.dtype for x in batch[:3]] == [torch.int32, torch.int64, torch.int32]
    assert batch.inputs.tolist() == tokens[:-1] and batch.targets.tolist() == tokens[1:]
    assert batch.cu_seqlens.tolist() == starts + [num_tokens] * (len(batch.cu_seqlens) - len(starts))
    assert batch.cu_seqlens[-1] == num_tokens, "no room for the last piece's end"
    assert batch.max_seqlen >= np.diff(batch.cu_seqlens).max()


# A shard is a run of document lengths several times over, so that most examples feed a step or more.
shard_lengths = st.builds(
    lambda lengths, times: lengths * times,
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(4, 16),
)
corpora = st.fixed_dictionaries(dict(
    lengths=st.lists(shard_lengths, min_size=1, max_size=3),
    microbatch_tokens=st.sampled_from([2, 6, 16, 24]),
    longest=st.integers(1, 30),
    junk=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    epochs=st.integers(1, 3),
))


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(corpora)
def test_batches_are_those_of_a_plain_packer_at_every_world_size(corpus):
    """Pieces start at BOS, are cut at the limit and to fit, their rests dropped, across shards and passes.

    16 ranks have one microbatch of half the length each.
    """
    with TemporaryDirectory() as folder:
        corpus = Corpus(folder, **corpus)
        assume(len(corpus.pack(16)) and len(corpus.pack()))
        for world_size in (1, 2, 8, 16):
            corpus.check(world_size)


def test_the_plans_line_counts_what_a_run_takes_of_the_data(tmp_path):
    """Three passes, the last of them in part: 2 steps are 16 microbatches of 9 tokens, each a document."""
    corpus = Corpus(tmp_path, [[9] * 4, [12] * 2], microbatch_tokens=8, longest=30, junk=(5, 0), epochs=3)
    assert corpus.plan(2).summary.startswith(
        "data: 65 tokens in 2 shards; the run reads 156 in 3 passes, uses 144 (92.3%) and drops ")


@pytest.mark.parametrize("lengths, microbatch_tokens, room", [
    ([12] * 8, 6, 128),
    ([1] * 8 * 127, 126, 128),
    (([1] * 126 + [3]) * 8, 128, 128),  # 127 starts and the end
    (([1] * 127 + [2]) * 8, 128, 256),  # 128 starts leave no room for the end
    ([38_401] * 8, 38_400, 128),
    ([38_701] * 8, 38_700, 256),  # above 128 times 300 tokens
])
def test_places_of_documents_have_a_300th_of_the_tokens_or_the_room_they_need(
    tmp_path, lengths, microbatch_tokens, room
):
    corpus = Corpus(tmp_path, [lengths], microbatch_tokens, longest=50_000)
    assert {len(batch.cu_seqlens) for batch in corpus.check()} == {room}


# ---- The thread that works ahead

@pytest.fixture
def corpus(tmp_path):
    """16 steps of 8 microbatches of one document of 8 tokens each, in two shards."""
    return Corpus(tmp_path, [[8] * 64, [8] * 64], microbatch_tokens=7, longest=30)


def test_batches_begin_at_any_step_and_end_with_the_run(corpus):
    for step in (0, 7, 12, 15):
        for rank, batches in enumerate(corpus.batches(16, world_size=2, first_step=step)):
            expected = corpus.pack()[8 * step + rank :: 2]
            for batch, (pieces, _) in zip(batches, expected, strict=True):
                assert_batch_is(batch, pieces)


def test_a_shard_that_is_cut_while_in_use_ends_the_run_after_whole_batches(corpus):
    [batches], path = corpus.batches(16), corpus.plan(16).shards[0].path
    next(batches)
    os.truncate(path, 1024 + 2 * 300)  # within the 38th document
    for pieces, _ in corpus.pack()[1:37]:
        assert_batch_is(next(batches), pieces)
    with pytest.raises(UserError, match=f"^{path}: expected tokens 296 to 304, found 4 of them; "):
        next(batches)


def no_disk(rank):
    """The loader's thread of rank 1 fails in the third step."""
    batches = iter([None] * 10)

    def fail(*_):
        if threading.current_thread().name.startswith("loader") and next(batches, "none") == "none":
            raise UserError("expected a disk, found none")

    if rank == 1:
        before(train_gpt, "make_batch", fail)


def test_an_error_in_one_ranks_thread_ends_all_ranks_with_its_sentence(data):
    run = Run(replace(data, warmup_steps=0), no_disk, ranks=2)
    codes = run.wait()
    assert codes[0] != 0 and codes[1] == 1
    said = run.text()
    assert said.count("expected a disk") == 1 and "\nrank 1: expected a disk, found none\n" in "\n" + said
    assert "step:2/6 train_time" in said and "final_step" not in said


@pytest.mark.parametrize("unreadable", [False, True])
def test_what_all_ranks_find_wrong_is_told_once(data, tmp_path, unreadable):
    """No shard; or one that cannot be opened, a link to nowhere."""
    (tmp_path / "train_0.bin").unlink()
    if unreadable:
        (tmp_path / "train_0.bin").symlink_to("nowhere")
    said = ran(data, ranks=2, code=1)
    assert said.count("\n") == 1 and f"{tmp_path}/train_" in said and "expected " in said, said
    assert ("No such file or directory" if unreadable else "found none; ") in said


# ---- Validation

@pytest.fixture
def val_tokens():
    """257 tokens: slices of 64 with many starts, none at all, one at 0, one at the end; and a last target."""
    tokens = np.random.default_rng(7).integers(0, BOS, size=257).astype(np.uint16)
    tokens[[0, 3, 4, 5, 40, 128, 255, 256]] = BOS
    return tokens


def slices(tokens):
    """Each slice of 64 as the pieces of a microbatch; a slice's first token opens one."""
    for first in range(0, 256, 64):
        part = tokens[first : first + 65].tolist()
        starts = [i for i in range(64) if i == 0 or part[i] == BOS]
        yield [part[a:b] for a, b in zip(starts, [*starts[1:], 65])]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_validation_token_is_counted_once_over_all_ranks(small, val_tokens, world_size):
    batches = [x for rank in range(world_size)
               for x in train_gpt.validation_batches(val_tokens, small, rank, world_size, CPU)]
    assert sorted(number for number, _ in batches) == [0, 1, 2, 3]
    for number, pieces in enumerate(slices(val_tokens)):
        assert_batch_is(dict(batches)[number], pieces)


@pytest.mark.parametrize("many, length", [(127, 128), (128, 256), (300, 384)])
def test_validation_batches_have_the_same_shapes_for_all_slices_and_ranks(small, many, length):
    """One slice has `many` starts, and the others hardly any; every rank must know of it."""
    s = replace(small, val_tokens=1500, val_slice_tokens=300)
    text = np.full(1501, 7, dtype=np.uint16)
    text[300 : 300 + many] = BOS
    batches = [x for rank in range(3) for _, x in train_gpt.validation_batches(text, s, rank, 3, CPU)]
    shapes = {(len(x.inputs), len(x.targets), len(x.cu_seqlens), x.max_seqlen) for x in batches}
    assert shapes == {(300, 300, length, 300)}
    assert sorted(int((x.cu_seqlens < 300).sum()) for x in batches) == [1, 1, 1, 1, many]


def test_the_validation_loss_is_the_mean_over_all_tokens(small, val_tokens):
    model, stage = fresh_model(small), stage_of(small, 12, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        losses = []
        for pieces in slices(val_tokens):
            tokens = torch.tensor(sum(pieces, []))
            starts = torch.tensor([0, *map(len, pieces[:-1]), len(pieces[-1]) - 1]).cumsum(0).int()
            losses.append(model(tokens[:-1].int(), tokens[1:], starts, 64, stage).item())
    assert max(losses) - min(losses) > 1
    found = train_gpt.validate(model, val_tokens, small, 0, 1, stage)
    assert found == pytest.approx(sum(losses) / 256, rel=1e-6)
