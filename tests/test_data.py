"""Shards, the packing of documents into training batches, and validation."""

import json
import os
import re
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SMALL, launch, overrides, random_documents, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt

BOS = SMALL["bos_id"]


# ---------------------------------------------------------------------------------------------------
# Shards that are wrong, and data that do not suffice


def complaint(s):
    with pytest.raises(train_gpt.UserError) as error:
        train_gpt.check_data(s, train_gpt.plan_batch(s, 1))
    assert error.value.exit_code == 1
    return str(error.value)


def header_cut(path):
    path.write_bytes(path.read_bytes()[:500])


def token_lost(path):
    path.write_bytes(path.read_bytes()[:-2])


def tokens_behind(path):
    path.write_bytes(path.read_bytes() + bytes(6))


def half_a_token_behind(path):
    path.write_bytes(path.read_bytes() + bytes(1))


GOOD = [BOS, 1, 2, 3]
WRONG = {  # what is done to a shard, and what the message must say was expected and found
    "empty file": (lambda path: path.write_bytes(b""), "1024 bytes", "0 bytes"),
    "header cut": (header_cut, "1024 bytes", "500 bytes"),
    "wrong magic": (lambda path: write_shard(path, GOOD, magic=20240521), "20240520", "20240521"),
    "wrong version": (lambda path: write_shard(path, GOOD, version=2), "version 1", "version 2"),
    "count too large": (lambda path: write_shard(path, GOOD, count=104), "1,232 bytes", "1,032 bytes"),
    "count too small": (lambda path: write_shard(path, GOOD, count=3), "1,030 bytes", "1,032 bytes"),
    "a token lost": (lambda path: (write_shard(path, GOOD), token_lost(path)), "1,032 bytes", "1,030 bytes"),
    "tokens behind": (
        lambda path: (write_shard(path, GOOD), tokens_behind(path)),
        "1,032 bytes",
        "1,038 bytes",
    ),
    "odd byte count": (
        lambda path: (write_shard(path, GOOD), half_a_token_behind(path)),
        "1,032 bytes",
        "1,033 bytes",
    ),
    "no tokens": (lambda path: write_shard(path, []), "at least 1 token", "0"),
    "token beyond the vocabulary": (
        lambda path: write_shard(path, [BOS, 1, 2, 50]),
        "VOCAB_SIZE=50",
        "50 at token 3",
    ),
    "several tokens beyond it": (
        lambda path: write_shard(path, [BOS, 1, 55, 2, 60]),
        "VOCAB_SIZE=50",
        "55 at token 2",
    ),
    "no BOS": (lambda path: write_shard(path, [1, 2, 3]), "BOS_ID=49", "no such token"),
}


@pytest.mark.parametrize("file", ["train_0.bin", "val_0.bin"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_shard_is_named_with_what_was_expected_and_found_and_a_remedy(data, tmp_path, wrong, file):
    spoil, expected, found = WRONG[wrong]
    spoil(tmp_path / file)
    if file.startswith("val"):  # enough tokens behind it, so that only the shard is wrong
        write_shard(tmp_path / "val_1.bin", np.concatenate(random_documents(3, 40)))
    text = complaint(data)
    assert text.startswith(f"{tmp_path / file}: expected ")
    foreign = expected.startswith(("VOCAB_SIZE", "BOS_ID"))
    assert ("; set PRESET, or VOCAB_SIZE and BOS_ID," if foreign else "; delete it and make it again") in text
    assert text.endswith(", or name other files.")
    said_expected, said_found = text.split("; ")[0].split(": expected ", 1)[1].split(", found ")
    assert expected in said_expected and found in said_found
    assert said_expected.split(", ")[0] not in said_found, "it found what it expected"


@pytest.mark.parametrize("setting, pattern", [("train_files", "none_*.bin"), ("val_files", "none_*.bin")])
def test_a_pattern_without_a_match_is_named_with_a_remedy(data, tmp_path, setting, pattern):
    """An own pattern is to be corrected; where FineWeb is missing, it is fetched or the demo taken."""
    text = complaint(replace(data, **{setting: str(tmp_path / pattern)}))
    name = setting.upper()
    assert text == (
        f"{name}: expected token shards at {tmp_path / pattern}, found none; correct {name} or DATA_PATH."
    )
    text = complaint(
        replace(data, data_path=str(tmp_path), **{setting: getattr(train_gpt.Settings, setting)})
    )
    assert text.startswith(f"{name}: expected token shards at {tmp_path}/data/fineweb10B/fineweb_")
    assert "python data/cached_fineweb10B.py" in text and "PRESET=demo" in text


def test_a_folder_that_matches_a_pattern_is_no_shard(data, tmp_path):
    (tmp_path / "train_1.bin").mkdir()
    shards, _, _ = train_gpt.check_data(data, train_gpt.plan_batch(data, 1))
    assert [shard.path.name for shard in shards] == ["train_0.bin"]
    (tmp_path / "train_0.bin").unlink()
    assert complaint(data).startswith("TRAIN_FILES: expected token shards at ")


def test_a_file_that_is_gone_when_it_is_opened_is_an_unreadable_shard(data, tmp_path):
    (tmp_path / "train_1.bin").symlink_to(tmp_path / "gone")
    text = complaint(data)
    shard = tmp_path / "train_1.bin"
    assert text.startswith(f"{shard}: expected a readable token shard, found: No such file or directory; ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_shard_without_read_permission_is_unreadable(data, tmp_path):
    shard = tmp_path / "train_0.bin"
    shard.chmod(0)
    text = complaint(data)
    assert text.startswith(f"{shard}: expected a readable token shard, found") and "Permission denied" in text


def test_too_few_tokens_for_the_planned_steps_are_counted_before_step_0(data, tmp_path):
    steps = train_gpt.check_data(data, train_gpt.plan_batch(data, 1))[2].steps
    assert steps == 6
    write_shard(tmp_path / "train_0.bin", [BOS, *[1] * 39] * 30)  # 1,200 tokens; 16 documents a step
    text = complaint(data)
    assert text.startswith(
        "TRAIN_FILES: expected documents for NUM_ITERATIONS=6 steps of 512 tokens, "
        "found 1,200 tokens in 1 shard, enough for 1 step; "
    )
    assert "lower NUM_ITERATIONS, raise EPOCHS=1, or add" in text
    train_gpt.check_data(replace(data, num_iterations=1), train_gpt.plan_batch(data, 1))
    train_gpt.check_data(replace(data, epochs=4), train_gpt.plan_batch(data, 1))


@pytest.mark.parametrize("documents, steps, command", [
    (30, 7, " (python data/cached_fineweb10B.py 7)."),  # one feeds one step
    (1, 7, " (python data/cached_fineweb10B.py 90)."),  # none, and 40 tokens for 512 a step, 7 times
    (30, 200, ", or add shards."),  # more than there are
])
def test_the_command_that_fetches_what_is_missing_is_one_that_can_be_run(data, tmp_path, documents, steps,
                                                                        command):
    folder = tmp_path / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    write_shard(folder / "fineweb_train_000001.bin", [BOS, *[1] * 39] * documents)
    files = train_gpt.Settings.train_files
    s = replace(data, train_files=files, data_path=str(tmp_path), num_iterations=steps)
    assert complaint(s).endswith(command)


def test_too_few_validation_tokens_are_counted_over_all_shards(data, tmp_path):
    write_shard(tmp_path / "val_0.bin", [BOS] * 200)
    write_shard(tmp_path / "val_1.bin", [BOS] * 56)
    text = complaint(data)
    assert text.startswith("VAL_FILES: expected at least VAL_TOKENS + 1 = 257 tokens in ")
    assert str(tmp_path) in text and "found 256; lower VAL_TOKENS or add shards." in text
    write_shard(tmp_path / "val_1.bin", [BOS] * 57)
    train_gpt.check_data(data, train_gpt.plan_batch(data, 1))


def test_shards_are_taken_in_name_order_and_validation_goes_on_across_them(data, tmp_path):
    texts = [np.concatenate(random_documents(seed, 4, longest=70)) for seed in (5, 6, 7)]
    for name, tokens in zip(("val_2", "val_0", "val_1"), texts):
        write_shard(tmp_path / f"{name}.bin", tokens)
    for name in ("train_1", "train_00"):
        write_shard(tmp_path / f"{name}.bin", texts[0])
    shards, val_tokens, _ = train_gpt.check_data(data, train_gpt.plan_batch(data, 1))
    assert [shard.path.name for shard in shards] == ["train_0.bin", "train_00.bin", "train_1.bin"]
    whole = np.concatenate([texts[1], texts[2], texts[0]])
    assert len(texts[1]) < 257 < len(whole)
    assert val_tokens.tolist() == whole[:257].tolist()


# ---------------------------------------------------------------------------------------------------
# Training batches, against a packer of lists


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
    """Shards on disk, given as lists of documents, with `junk` tokens before the first BOS of each."""

    def __init__(self, folder, lengths, microbatch_tokens, longest, junk=None, **changes):
        rng = np.random.default_rng(0)

        def draw(n):
            return rng.integers(0, BOS, size=n).tolist()

        self.shards = [[[BOS, *draw(length - 1)] for length in shard] for shard in lengths]
        self.junk = [draw(n) for n in junk or [0] * len(lengths)]
        self.s = replace(
            train_gpt.Settings(),
            **{
                **SMALL,
                "batch_tokens": 8 * microbatch_tokens,
                "max_piece_tokens": longest,
                "num_iterations": 1000,
                **changes,
            },
        )
        paths = [
            write_shard(Path(folder) / f"{i}.bin", sum(shard, junk))
            for i, (shard, junk) in enumerate(zip(self.shards, self.junk))
        ]
        self.opened = [train_gpt.TokenShard(path, self.s) for path in paths]

    def microbatches(self, microbatch_tokens=None):
        microbatch_tokens = microbatch_tokens or self.s.batch_tokens // 8
        return pack(self.shards, microbatch_tokens, self.s.max_piece_tokens, self.s.epochs)

    def plan(self, world_size=1):
        return train_gpt.plan_data(self.opened, train_gpt.plan_batch(self.s, world_size), self.s)

    def loaders(self, world_size):
        batch, plan = train_gpt.plan_batch(self.s, world_size), self.plan(world_size)
        return [
            train_gpt.TrainLoader(self.opened, self.s, batch, plan, rank, CPU) for rank in range(world_size)
        ]

    def batches(self, world_size=1):
        """All ranks' batches of all steps, in the order of the microbatches."""
        loaders = self.loaders(world_size)
        rounds = self.plan(world_size).steps * train_gpt.plan_batch(self.s, world_size).per_rank
        return [loader.next_batch() for _ in range(rounds) for loader in loaders]


def assert_batch_is(batch, pieces):
    """Inputs, shifted targets and padded piece starts of one microbatch."""
    tokens = sum(pieces, [])
    num_tokens = len(tokens) - 1
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    assert (batch.inputs.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (
        torch.int32,
        torch.int64,
        torch.int32,
    )
    assert batch.inputs.tolist() == tokens[:-1]
    assert batch.targets.tolist() == tokens[1:]
    starts = [start for start in starts if start < num_tokens]
    assert batch.cu_seqlens.tolist() == starts + [num_tokens] * (len(batch.cu_seqlens) - len(starts))
    assert batch.cu_seqlens[-1] == num_tokens, "no room for the last piece's end"


# A shard is a run of document lengths several times over, so that most examples feed a step or more.
shard_lengths = st.builds(
    lambda lengths, times: lengths * times,
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 12),
)
corpora = st.fixed_dictionaries(
    dict(
        lengths=st.lists(shard_lengths, min_size=1, max_size=3),
        microbatch_tokens=st.integers(1, 24),
        longest=st.integers(1, 30),
        epochs=st.integers(1, 3),
    )
)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(corpora, st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_batches_are_those_of_a_plain_packer_at_every_world_size(corpus, junk):
    """Pieces start at BOS, are cut at the limit and to fit, and their rests dropped, across all shards."""
    with TemporaryDirectory() as folder:
        corpus = Corpus(folder, junk=junk[: len(corpus["lengths"])], **corpus)
        expected = corpus.microbatches()
        expected = expected[: len(expected) // 8 * 8]
        for world_size in (1, 2, 4, 8):
            found = corpus.batches(world_size)
            assert len(found) == len(expected)
            assert {batch.cu_seqlens.shape for batch in found} <= {(128,)}
            for batch, (pieces, _) in zip(found, expected):
                assert all(piece[0] == BOS for piece in pieces)
                assert_batch_is(batch, pieces)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(corpora, st.lists(st.integers(0, 4), min_size=3, max_size=3), st.integers(1, 8))
def test_the_plan_counts_what_the_loader_can_serve(corpus, junk, num_iterations):
    with TemporaryDirectory() as folder:
        corpus = Corpus(folder, junk=junk[: len(corpus["lengths"])], num_iterations=num_iterations, **corpus)
        plan, microbatches = corpus.plan(), corpus.microbatches()
        steps = min(num_iterations, len(microbatches) // 8)
        planned = microbatches[: 8 * steps]
        documents = [(i, document) for i, shard in enumerate(corpus.shards) for document in shard]
        documents *= corpus.s.epochs
        passed = documents[: planned[-1][1] if planned else 0]
        used = sum(len(piece) for pieces, _ in planned for piece in pieces)
        # of a shard that was entered, what stands before its first BOS was passed too, in every pass
        entered = [i for n, (i, document) in enumerate(passed) if document is corpus.shards[i][0]]
        total = sum(len(document) for _, document in passed) + sum(len(corpus.junk[i]) for i in entered)
        assert plan.steps == steps
        assert plan.tokens_used == used == steps * 8 * (corpus.s.batch_tokens // 8 + 1)
        assert plan.tokens_dropped == total - used
        assert plan.most_pieces == max((len(pieces) for pieces, _ in planned), default=0)
        assert plan.passes == -(-len(passed) // (len(documents) // corpus.s.epochs))
        walk = train_gpt.DocumentWalk(corpus.opened, corpus.s.max_piece_tokens, corpus.s.epochs)
        served = 0
        while served < 8 * num_iterations and walk.next_microbatch(corpus.s.batch_tokens // 8) is not None:
            served += 1
        assert served // 8 == plan.steps


def check_one_world(corpus, steps):
    expected, found = corpus.microbatches(), corpus.batches()
    assert len(found) == 8 * steps
    for batch, (pieces, _) in zip(found, expected):
        assert_batch_is(batch, pieces)
    return found


def test_a_batch_goes_on_across_the_end_of_a_shard_and_loses_nothing(tmp_path):
    """Microbatches of 11 tokens, documents of 5 or 6: shards end within a microbatch and within a step."""
    documents = [[5, 6] * 5 + [5], [6] + [5, 6] * 9, [5, 6] * 2]
    corpus = Corpus(tmp_path, documents, microbatch_tokens=10, longest=30)
    check_one_world(corpus, steps=2)
    plan = corpus.plan()
    assert (plan.steps, plan.tokens_used, plan.tokens_dropped) == (2, 176, 0)
    assert sum(len(document) for shard in corpus.shards for document in shard) == 17 * 11


def test_all_documents_of_all_shards_are_used_once_and_in_order(tmp_path):
    """Where nothing needs cutting, the batches are the shards' own text."""
    corpus = Corpus(tmp_path, [[4, 4] * 7, [8] * 2, [2] * 28], microbatch_tokens=7, longest=8)
    found = check_one_world(corpus, steps=2)
    text = sum((document for shard in corpus.shards for document in shard), [])
    served = sum(([*batch.inputs.tolist(), batch.targets[-1].item()] for batch in found), [])
    assert served == text[:128] and len(text) == 128


def test_a_bos_as_last_token_of_a_shard_is_a_document_of_one_token(tmp_path):
    corpus = Corpus(tmp_path, [[9] * 9 + [1], [8] * 14], microbatch_tokens=8, longest=30)
    check_one_world(corpus, steps=2)
    assert corpus.microbatches()[9][0][0] == [BOS]


def test_a_document_longer_than_everything_gives_one_piece_and_is_gone(tmp_path):
    corpus = Corpus(tmp_path, [[5000] + [12] * 15], microbatch_tokens=6, longest=30)
    found = check_one_world(corpus, steps=2)
    assert found[0].inputs.tolist() == corpus.shards[0][0][:6]
    assert corpus.plan().tokens_dropped == (5000 - 7) + 15 * 5


def test_tokens_before_a_shards_first_bos_are_in_no_batch(tmp_path):
    corpus = Corpus(tmp_path, [[8] * 4, [8] * 4], microbatch_tokens=7, longest=30, junk=[3, 5])
    found = check_one_world(corpus, steps=1)
    assert all(batch.inputs[0] == BOS for batch in found)
    assert corpus.plan().tokens_dropped == 8


def test_more_pieces_than_one_in_300_tokens_still_fit(tmp_path):
    corpus = Corpus(tmp_path, [[1] * 8 * 301], microbatch_tokens=300, longest=30)
    found = check_one_world(corpus, steps=1)
    assert {batch.cu_seqlens.shape for batch in found} == {(384,)}
    assert corpus.plan().most_pieces == 301


def test_as_many_pieces_as_there_is_room_for_starts_leave_room_for_the_end(tmp_path):
    corpus = Corpus(tmp_path, [([1] * 127 + [2]) * 8], microbatch_tokens=128, longest=30)
    found = check_one_world(corpus, steps=1)
    assert all((batch.cu_seqlens < 128).sum() == 128 for batch in found)


@pytest.mark.parametrize(
    "microbatch_tokens, length", [(1_000, 128), (38_400, 128), (38_699, 128), (38_700, 256), (49_152, 256)]
)
def test_piece_starts_are_padded_to_a_300th_of_the_tokens_up_to_128s(tmp_path, microbatch_tokens, length):
    corpus = Corpus(
        tmp_path,
        [[microbatch_tokens + 1]],
        microbatch_tokens,
        longest=microbatch_tokens + 1,
        microbatches=1,
        batch_tokens=microbatch_tokens,
    )
    [batch] = corpus.batches()
    assert batch.cu_seqlens.tolist() == [0] + [microbatch_tokens] * (length - 1)


def test_sixteen_ranks_have_one_microbatch_of_half_the_length_each(tmp_path):
    corpus = Corpus(tmp_path, [list(range(1, 41)) * 2], microbatch_tokens=16, longest=30)
    plan = train_gpt.plan_batch(corpus.s, 16)
    assert (plan.microbatches, plan.microbatch_tokens, plan.per_rank, plan.world_size) == (16, 8, 1, 16)
    expected, found = corpus.microbatches(microbatch_tokens=8), corpus.batches(world_size=16)
    assert len(found) == len(expected) // 16 * 16 > 16
    for batch, (pieces, _) in zip(found, expected):
        assert_batch_is(batch, pieces)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(corpora, st.integers(2, 6))
def test_the_parts_of_a_microbatch_are_its_pieces_and_padding_that_does_not_count(corpus, num_parts):
    """Each part holds whole pieces and the targets that they had in the microbatch, in a fixed room."""
    with TemporaryDirectory() as folder:
        corpus = Corpus(folder, microbatch_parts=num_parts, **corpus)
        room = train_gpt.part_tokens(corpus.s.batch_tokens // 8, corpus.s)
        [loader], expected = corpus.loaders(1), corpus.microbatches()
        for pieces, _ in expected[: len(expected) // 8 * 8]:
            parts = [loader.next_batch() for _ in range(num_parts)]
            assert {x.shape for part in parts for x in (part.inputs, part.targets)} == {(room,)}
            tokens, starts = sum(pieces, []), [0, *np.cumsum([len(piece) for piece in pieces])]
            inputs, targets, ends = [], [], [0]
            for part in parts:
                count = int((part.targets != train_gpt.NO_TARGET).sum())
                assert (part.targets[count:] == train_gpt.NO_TARGET).all()
                inputs += part.inputs[:count].tolist()
                targets += part.targets[:count].tolist()
                ends.append(ends[-1] + count)
                own = [start - ends[-2] for start in starts if ends[-2] <= start < ends[-1]]
                found = part.cu_seqlens.tolist()
                assert found[: len(own)] == own and set(found[len(own) :]) >= {count, room}
                assert found[-1] == room and 0 <= min(np.diff(found)) and max(np.diff(found)) <= part.longest
                assert part.longest == min(corpus.s.max_piece_tokens, room)
            assert (inputs, targets) == (tokens[:-1], tokens[1:])
            assert set(ends) <= {*starts, len(tokens) - 1}, "a piece was cut"


@pytest.mark.parametrize("world_size", [3, 5, 6, 7, 12])
def test_a_world_size_that_does_not_divide_the_batch_is_refused(small, world_size):
    with pytest.raises(train_gpt.UserError, match=f"WORLD_SIZE: expected .* found {world_size};") as error:
        train_gpt.plan_batch(small, world_size)
    assert error.value.exit_code == 2


# ---------------------------------------------------------------------------------------------------
# The thread that works ahead


@pytest.fixture
def corpus(tmp_path):
    """128 documents of 8 tokens, one a microbatch, in two shards."""
    return Corpus(tmp_path, [[8] * 64, [8] * 64], microbatch_tokens=7, longest=30)


def all_of(batch):
    return [x.tolist() for x in batch[:3]]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_seek_goes_on_from_any_position_that_a_batch_had(corpus, ahead):
    batch, plan = train_gpt.plan_batch(corpus.s, 1), corpus.plan()
    loader = train_gpt.TrainLoader(corpus.opened, corpus.s, batch, plan, 0, CPU, batches_ahead=ahead)
    assert loader.position == (0, 0)
    batches, positions = [], []
    for _ in range(128):
        positions.append(loader.position)
        batches.append(all_of(loader.next_batch()))
    for i in (100, 0, 63, 64, 127, 5):
        loader.seek(positions[i])
        assert loader.position == positions[i]
        assert all_of(loader.next_batch()) == batches[i]


def test_the_loader_says_what_its_steps_took_as_the_plan_foretold(tmp_path):
    corpus = Corpus(tmp_path, [[13] * 30, [9] * 40], 7, longest=30, junk=[3, 2], epochs=3)
    plan, [loader], passes = corpus.plan(), corpus.loaders(1), []
    for _ in range(8 * plan.steps):
        loader.next_batch()
        passes.append(loader.passes)
    assert loader.use(plan.steps) == plan and plan.passes == 3
    assert passes == sorted(passes) and set(passes) == {1, 2, 3}


def test_going_on_makes_room_for_what_comes_or_says_that_there_is_too_little(tmp_path):
    """One document a microbatch in the first shard, and in the second one a token."""
    corpus = Corpus(tmp_path, [[301] * 8, [1] * 8 * 301], 300, longest=301, num_iterations=1)
    [loader] = corpus.loaders(1)
    assert loader.cu_seqlens_length == 128
    loader.resume(0, (1, 0))
    assert loader.cu_seqlens_length == len(loader.next_batch().cu_seqlens) == 384
    assert loader.place((0, 3)) == ["0.bin", 3 * 301] and loader.place((2, 0)) == ["0.bin", 0]
    with pytest.raises(train_gpt.UserError, match="^RESUME: expected documents .* until step 0, .* step 0;"):
        loader.resume(0, (1, 9))


def test_a_shard_that_another_file_replaces_stays_what_it_was(corpus):
    expected = [all_of(batch) for batch in corpus.batches()]
    [loader] = corpus.loaders(1)
    found = [all_of(loader.next_batch()) for _ in range(8)]
    for shard in corpus.opened:
        beside = write_shard(shard.path.with_name("new"), [BOS] * 512)
        beside.rename(shard.path)
    found += [all_of(loader.next_batch()) for _ in range(120)]
    assert found == expected


def overwritten(path):
    with open(path, "r+b") as file:
        file.seek(train_gpt.SHARD_HEADER_BYTES + 2 * 300)
        file.write(np.asarray([BOS, 1, BOS], dtype="<u2").tobytes())


def poisoned(path):
    with open(path, "r+b") as file:
        file.seek(train_gpt.SHARD_HEADER_BYTES + 2 * 300)
        file.write(np.asarray([77], dtype="<u2").tobytes())


def shortened(path):
    with open(path, "r+b") as file:
        file.truncate(train_gpt.SHARD_HEADER_BYTES + 2 * 300)


def other_words(path):
    """The documents stay where they are."""
    with open(path, "r+b") as file:
        file.seek(train_gpt.SHARD_HEADER_BYTES + 2 * 9)
        file.write(np.asarray([7] * 7, dtype="<u2").tobytes())


CHANGES = {  # what is done to the first shard after step 0, and what is found where it is no longer looked at
    "other documents": (overwritten, "written to since"),
    "other words": (other_words, None),
    "a token beyond the vocabulary": (poisoned, "found 77 at token 300"),
    "cut": (shortened, "expected tokens 296 to 304, found 8 bytes of them"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_is_changed_while_in_use_ends_the_run(corpus, change):
    expected, found = [all_of(batch) for batch in corpus.batches()], []
    time.sleep(0.02)  # file systems do not count time finer
    [loader] = corpus.loaders(1)
    loader.next_batch()
    CHANGES[change][0](corpus.opened[0].path)
    with pytest.raises(train_gpt.UserError) as error:
        for _ in range(9):
            found.append(all_of(loader.next_batch()))
    assert found == expected[1 : 1 + len(found)], "whole batches before the change"
    assert str(corpus.opened[0].path) in str(error.value) and "written to since" in str(error.value)


@pytest.mark.parametrize("change", [name for name, (_, said) in CHANGES.items() if said])
def test_a_change_that_leaves_the_file_its_time_is_found_where_it_would_be_used(corpus, change, monkeypatch):
    spoil, said = CHANGES[change]
    monkeypatch.setattr(train_gpt.TokenShard, "look", lambda shard: (1024 + 2 * 512, None))
    corpus = Corpus(corpus.opened[0].path.parent, [[8] * 64, [8] * 64], microbatch_tokens=7, longest=30)
    expected = [all_of(batch) for batch in corpus.batches()]
    [loader] = corpus.loaders(1)
    loader.next_batch()
    spoil(corpus.opened[0].path)
    found = [all_of(loader.next_batch()) for _ in range(300 // 8 - 1)]
    assert found == expected[1 : 300 // 8], "whole batches before the change"
    with pytest.raises(train_gpt.UserError) as error:
        loader.next_batch()
    assert str(corpus.opened[0].path) in str(error.value) and said in str(error.value)


def test_a_disk_that_cannot_read_is_a_sentence_with_file_and_place(data, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(train_gpt.os, "pread", broken)
    shard = train_gpt.TokenShard(tmp_path / "train_0.bin", data)
    with pytest.raises(train_gpt.UserError, match=r"train_0.bin: expected to read 20 bytes from byte 1,034, "
                                                  "found Input/output error; "):
        shard.read(5, 15)


def test_a_pipe_is_no_shard(data, tmp_path):
    os.mkfifo(tmp_path / "train_1.bin")
    assert complaint(data).startswith(f"{tmp_path / 'train_1.bin'}: expected a file, found a pipe")


DYING = """
import sys
sys.path.insert(0, {root!r})
import train_gpt
assemble, left = train_gpt.TrainLoader.assemble, [20]

def dying(loader):
    left[0] -= 1
    if loader.rank == 1 and left[0] < 0:
        raise {error}
    return assemble(loader)

train_gpt.TrainLoader.assemble = dying
sys.exit(train_gpt.main([]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, said",
    [("train_gpt.UserError('no disk')", "rank 1: no disk"), ("MemoryError()", "MemoryError")],
)
def test_an_error_in_one_ranks_thread_ends_all_ranks_with_its_message(data, tmp_path, error, said):
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT), error=error))
    s = replace(data, num_iterations=30, epochs=9, warmup_steps=0, target_loss=0.0)
    done = launch(nproc=2, script=script, cwd=tmp_path, timeout=60, **overrides(s))
    assert done.returncode != 0 and said in done.stderr
    assert "train_loss" in done.stdout and "final_step" not in done.stdout


@pytest.mark.slow
def test_data_are_checked_under_python_without_asserts_too(data, tmp_path):
    write_shard(tmp_path / "train_0.bin", [BOS, 1, 2, 50])
    done = launch("--dry-run", PYTHONOPTIMIZE=1, **overrides(data))
    assert done.returncode == 1 and "found 50 at token 3" in done.stderr and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------
# Manifests


def manifest(folder, **changes):
    """A manifest beside the shards of the fixture `data`."""
    tokens = {path.name: (path.stat().st_size - 1024) // 2 for path in folder.glob("*.bin")}
    shards = {name: dict(documents=1, tokens=count, sha256=sha256((folder / name).read_bytes()).hexdigest())
              for name, count in tokens.items()}
    about = dict(format=1, tokenizer="bytes", vocab_size=50, bos_id=BOS, shards=shards) | changes
    (folder / "manifest.json").write_text(json.dumps(about))


def test_a_manifest_that_fits_changes_nothing(data, tmp_path):
    manifest(tmp_path)
    train_gpt.check_data(data, train_gpt.plan_batch(data, 1))


def test_a_manifest_that_says_nothing_of_these_shards_is_another_corpuss(data, tmp_path):
    manifest(tmp_path, bos_id=3, shards={})
    train_gpt.check_data(data, train_gpt.plan_batch(data, 1))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(bos_id=48), "VOCAB_SIZE=50 and BOS_ID=48, found VOCAB_SIZE=50 and BOS_ID=49; set them so."),
        (dict(vocab_size=51), "VOCAB_SIZE=51 and BOS_ID=49, found VOCAB_SIZE=50 and BOS_ID=49; set them so."),
    ],
)
def test_settings_are_held_against_the_manifest(data, tmp_path, changes, said):
    manifest(tmp_path, **changes)
    text = complaint(data)
    assert text.startswith(f"{tmp_path / 'manifest.json'}: ") and said in text


def test_a_shard_of_another_length_than_its_manifest_says_is_refused(data, tmp_path):
    manifest(tmp_path)
    write_shard(tmp_path / "val_0.bin", [BOS] * 400)
    text = complaint(data)
    assert text.startswith(f"{tmp_path / 'val_0.bin'}: expected ")
    assert "tokens, as manifest.json says, found 400;" in text


@pytest.mark.parametrize("name", ["train_0.bin", "val_0.bin"])
def test_a_shard_with_other_tokens_than_its_manifest_says_is_refused(data, tmp_path, name):
    manifest(tmp_path)
    with open(tmp_path / name, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\7\0" if (tmp_path / name).read_bytes()[-2] != 7 else b"\6\0")
    text = complaint(data)
    found = "expected the bytes of its manifest.json's SHA-256, found others"
    assert text.startswith(f"{tmp_path / name}: {found}")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"shards": []}', "\udcff"])
def test_a_damaged_manifest_is_one_sentence(data, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    assert complaint(data).startswith(f"{tmp_path / 'manifest.json'}: expected a manifest of shards, found ")


# ---------------------------------------------------------------------------------------------------
# The benchmark


@pytest.mark.slow
@pytest.mark.parametrize("arguments, said", [
    (("--shards", 1), "shards: expected at least 2, "),
    (("--shard-tokens", 500_000), "expected documents for 983,060 tokens of batches, found "),
])
def test_the_benchmark_says_what_is_too_little_for_it(arguments, said):
    done = launch(*arguments, "--shard-tokens", 500_000, script=ROOT / "data" / "bench_loader.py")
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_benchmark_crosses_three_shard_ends_and_prints_its_figures():
    arguments = ("--shard-tokens", 2_000_000, "--step-ms", 1, "--rounds", 1)
    done = launch(*arguments, script=ROOT / "data" / "bench_loader.py")
    assert done.returncode == 0, done.stderr
    for figure in (
        r"opening: [\d.]+ s to the first batch of a shard of 2,000,000 tokens",
        r"waits, thread ahead: median [\d.]+ ms, worst [\d.]+ ms, in 117 steps of 1 ms",
        r"throughput: [\d.]+M tokens/s",
        r"memory: \d+ MiB beyond",
    ):
        assert re.search(figure, done.stdout), done.stdout


# ---------------------------------------------------------------------------------------------------
# Validation


def validation_text():
    """257 tokens: slices of 64 with many starts, none at all, one at 0, one at the end; and a last target."""
    rng = np.random.default_rng(7)
    text = rng.integers(0, BOS, size=257).astype(np.uint16)
    text[[0, 3, 4, 5, 40]] = BOS
    text[[128, 255, 256]] = BOS
    return text


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_validation_token_is_counted_once_over_all_ranks(small, world_size):
    text, batches = validation_text(), {}
    for rank in range(world_size):
        for number, batch in train_gpt.validation_batches(text, small, rank, world_size, CPU):
            assert number not in batches
            batches[number] = batch
    assert sorted(batches) == [0, 1, 2, 3]
    for number, batch in batches.items():
        start = 64 * number
        assert batch.inputs.tolist() == text[start : start + 64].tolist()
        assert batch.targets.tolist() == text[start + 1 : start + 65].tolist()
        starts = [i for i in range(64) if i == 0 or text[start + i] == BOS]
        assert batch.cu_seqlens.tolist() == starts + [64] * (128 - len(starts))
        assert (batch.inputs.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (
            torch.int32,
            torch.int64,
            torch.int32,
        )


@pytest.mark.parametrize("lone_bos", [0, 1])
@pytest.mark.parametrize("many, length", [(10, 128), (126, 128), (128, 256), (300, 384)])
def test_validation_batches_have_the_same_shapes_for_all_slices_and_ranks(small, lone_bos, many, length):
    """One slice has `many` starts, and the others hardly any; every rank must know of it."""
    s = replace(small, val_tokens=1500, val_slice_tokens=300)
    text = np.full(1501, 7, dtype=np.uint16)
    text[300 + lone_bos : 300 + many] = BOS
    shapes, starts, bounds = set(), {}, set()
    for rank in range(3):
        for number, batch in train_gpt.validation_batches(text, s, rank, 3, CPU):
            shapes.add((batch.inputs.shape, batch.targets.shape, batch.cu_seqlens.shape))
            starts[number] = int((batch.cu_seqlens < 300).sum())
            assert batch.cu_seqlens[-1] == 300
            bounds.add(batch.longest)
    assert shapes == {((300,), (300,), (length,))} and bounds == {300}
    assert starts == {0: 1, 1: many, 2: 1, 3: 1, 4: 1}


def test_validation_batches_all_say_how_long_the_longest_piece_of_any_is(small):
    text = np.full(257, 7, dtype=np.uint16)
    text[::20] = BOS
    text[[100, 120]] = 7  # from 80 to the slice's end at 128 are 48 tokens
    batches = [b for rank in (0, 1) for _, b in train_gpt.validation_batches(text, small, rank, 2, CPU)]
    assert [batch.longest for batch in batches] == [48] * 4
    assert max(max(np.diff(batch.cu_seqlens)) for batch in batches) == 48


@pytest.mark.parametrize("step, windows", [(0, (12, 4)), (3, (28, 12)), (6, (44, 20))])
def test_validate_is_the_plain_mean_over_slices_and_leaves_the_model_as_it_was(small, step, windows):
    model = train_gpt.GPT(small, train_gpt.plain_kernels())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    text, losses, seen = validation_text(), [], []

    def forward(inputs, targets, cu_seqlens, longest, windows):
        seen.append((model.training, torch.is_grad_enabled(), windows))
        return model(inputs, targets, cu_seqlens, longest, windows)

    found = train_gpt.validate(model, forward, text, small, train_gpt.World(0, 1, 0, 1), step)
    assert model.training and seen == 4 * [(False, False, windows)]
    for start in range(0, 256, 64):  # training mode sums over the tokens
        piece = torch.from_numpy(text[start : start + 65].astype(np.int64))
        starts = torch.tensor([i for i in range(64) if i == 0 or piece[i] == BOS] + [64], dtype=torch.int32)
        losses.append(model(piece[:-1].int(), piece[1:], starts, 64, windows).item() / 64)
    assert max(losses) - min(losses) > 0.01
    assert found == pytest.approx(sum(losses) / 4, rel=1e-6)
