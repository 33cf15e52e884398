"""How a step is fitted to a GPU's memory: the estimate beside measured peaks, what is chosen for which card,
and who may choose. The GPUs are fakes: their size is all that counts."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ran

import train_gpt
from train_gpt import Card

GIB = 2**30
HOPPER, ADA, AMPERE = (9, 0), (8, 9), (8, 6)


def preset(name, **changes):
    return replace(train_gpt.Settings(), **train_gpt.PRESETS[name] | changes)


# records/2026-11-26_H200: "peak memory allocated" of runs on one GPU [MiB]
ENGLISH = dict(batch_tokens=(49_152,), microbatches=6, val_slice_tokens=16_384, torch_compile=False)


@pytest.mark.parametrize("log, measured, changes", [
    ("mended/shapes.txt", 24_811, {}),
    ("first/shapes.txt", 24_745, dict(fp8_head=False)),  # its trial had refused float8
    ("float8-head/seed-0.txt", 6677, ENGLISH),
    ("bfloat16-head/seed-0.txt", 11_261, dict(fp8_head=False) | ENGLISH),
])
def test_the_estimate_is_near_the_peaks_that_were_measured_on_an_h200(log, measured, changes):
    there = Path(__file__).parent.parent / "records/2026-11-26_H200" / log
    if there.exists():
        assert f"\npeak memory allocated: {measured} MiB" in there.read_text(encoding="utf-8")
    training, validation = train_gpt.estimate_memory(preset("speedrun", **changes), 1, Card("", 0, HOPPER))
    assert max(training, validation) / 2**20 == pytest.approx(measured, rel=0.03)


def by_hand(s, kept_of_token, world_size=1):
    """Peak bytes as the blocks' backward pass begins: what blocks keep, beside their weights in bfloat16;
    logits, two bytes each, and their gradient, two bytes or one and one of its transpose; the gradient of the
    head; parameters, gradients, state; rotary tables."""
    network = train_gpt.NETWORKS[s.network]
    tokens = max(s.batch_tokens) // s.microbatches
    peak = tokens * (kept_of_token + 2 * 2 * s.padded_vocab)
    for name, row in network.declare_parameters(s, train_gpt.Kernels()).items():
        p = torch.empty(row.shape, dtype=row.dtype, device="meta")
        peak += 2 * p.nbytes + sum(x.nbytes for x in row.rule.init_state(p).values()) // world_size
        if "bank" in name:
            peak += 2 * p.numel()
        if name == "lm_head":
            peak += p.nbytes
    positions = network.positions_per_token * max(tokens, s.val_slice_tokens)
    return peak + positions * 3 * (s.model_dim // s.num_heads // 2) * 4


# GPT: 166 numbers of two bytes for each channel (11 x 4 of the MLPs, 122 of attention and stream) and 1 kB in
# float32. By hand 24.0 GiB with 8 microbatches, 13.5 with 16, 10.1 with 24, 8.3 with 32. With a tenth and
# 1 GiB on top: 27.4, 15.9, 12.1, 10.1. Validation's 10.1 becomes 12.1 with them.
GPT = "speedrun", 256_144
# Frontier: exclusive attention is counted in float32, though torch.compile computes it again. By hand
# 29.2 GiB with 8 microbatches, 17.4 with 16, 11.5 with 32, 8.5 with 64; 24 do not cut 131,072 tokens into
# equal parts. With what is on top: 33.1, 20.1, 13.6, 10.3. Validation's 15.4 becomes 17.9 with it.
FRONTIER = "frontier", 315_650


@pytest.mark.parametrize("name, kept_of_token, capability, chosen", [
    (*GPT, HOPPER, {80: (8, 262_144)}),
    (*GPT, ADA, {48: (8, 262_144), 24: (16, 262_144), 16: (24, 262_144), 12: (32, 131_072)}),
    (*GPT, AMPERE, {24: (16, 262_144)}),  # no float8
    (*FRONTIER, HOPPER, {80: (8, 262_144)}),
    (*FRONTIER, ADA, {24: (16, 262_144), 12: (64, 131_072)}),
    (*FRONTIER, AMPERE, {48: (8, 262_144), 16: (32, 131_072)}),
])
def test_what_is_chosen_for_each_size_of_card(name, kept_of_token, capability, chosen):
    for size, (microbatches, val_slice_tokens) in chosen.items():
        card = Card("a card", int(0.98 * size * GIB), capability)  # CUDA reports a little less
        fitted = train_gpt.fit_memory(preset(name), [], 1, [card])
        s = fitted.settings
        assert (s.microbatches, s.val_slice_tokens) == (microbatches, val_slice_tokens), f"{size} GB"
        training, _ = train_gpt.estimate_memory(s, 1, card)
        assert training == pytest.approx(by_hand(s, kept_of_token), rel=0.03)
        assert f"; chosen to fit: MICROBATCHES={microbatches}, VAL_SLICE_" in fitted.about[0]
        assert s == replace(preset(name), microbatches=microbatches, val_slice_tokens=val_slice_tokens)


def test_eight_ranks_share_the_state_and_take_more_microbatches_in_equal_numbers():
    small = Card("a card", 12 * GIB, ADA)
    fitted = train_gpt.fit_memory(preset("speedrun"), [], 8, 8 * [small])
    assert fitted.settings.microbatches == 24
    alone, _ = train_gpt.estimate_memory(fitted.settings, 1, small)
    shared, _ = train_gpt.estimate_memory(fitted.settings, 8, small)
    assert 0.5 * GIB < alone - shared < 2 * GIB
    assert set(train_gpt.microbatch_options(preset("speedrun"), 3)) == {24, 48, 96, 192} | {8}
    assert train_gpt.microbatch_options(preset("demo"), 1) == [2], "a microbatch holds the longest document"


def test_what_the_environment_sets_stays_and_a_warning_says_if_it_is_too_much():
    card = Card("a small card", 10 * GIB, ADA)
    s = preset("speedrun", microbatches=16)
    fitted = train_gpt.fit_memory(s, ["microbatches"], 1, [card])
    assert fitted.settings == replace(s, val_slice_tokens=131_072)
    assert fitted.about[0].startswith("memory: WARNING: more than fits: 13.")
    assert fitted.about[0].endswith("; chosen to fit: VAL_SLICE_TOKENS=131072")
    fitted = train_gpt.fit_memory(s, ["microbatches", "val_slice_tokens"], 1, [card])
    assert fitted.settings == s and fitted.about[0].endswith("of 10.0 GiB (a small card)")


def test_a_cpu_fits_nothing():
    assert train_gpt.fit_memory(preset("speedrun"), [], 1, [None]) == (preset("speedrun"), [], 0)


# Runs on the CPU with fakes for cards. Of a step of 4096 tokens, a rank's peak is 11 MB with 8 microbatches,
# nearly all of it what the blocks keep.
STEP = dict(batch_tokens=(4096,), max_seq_len=(64,), microbatches=8, epochs=50, warmup_steps=0)


class Cards:
    """A fault: a rank's card has this many bytes, and nothing but the peak is needed."""
    def __init__(self, *sizes):
        self.sizes = sizes

    def __call__(self, rank):
        train_gpt.MEMORY_FACTOR, train_gpt.MEMORY_SPARE = 1, 0
        train_gpt.read_card = lambda device: Card(f"card {rank}", self.sizes[rank], ADA)


def peak_of(s, microbatches):
    s = replace(s, microbatches=microbatches, val_slice_tokens=64)
    return max(train_gpt.estimate_memory(s, 1, Card("", 0, ADA)))


def last_log(s):
    path = max(Path(s.log_dir).glob("*/log.txt"), key=lambda path: path.stat().st_mtime_ns)
    return path.read_text(encoding="utf-8").split("=" * 100 + "\n")[-2:]


@pytest.mark.slow
def test_of_two_ranks_the_smaller_card_counts(data):
    s = replace(data, **STEP | dict(num_iterations=1))
    small = peak_of(s, 16)
    said = ran(s, Cards(100 * small, small), ranks=2, MICROBATCHES=None)
    settings, lines = last_log(s)
    assert "\nmicrobatches: 16\n" in settings or "\nmicrobatches: 32\n" in settings  # the state is shared
    chosen = int(re.search(r"^microbatches: (\d+)$", settings, re.M)[1])
    assert f"(card 1); chosen to fit: MICROBATCHES={chosen}" in said
    assert f"batch: 2 ranks x {chosen // 2} microbatches x {4096 // chosen} tokens" in lines
    assert re.search(r"^peak memory allocated: 0 MiB reserved: 0 MiB estimated: \d+ MiB$", lines, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_run_that_goes_on_with_another_card_keeps_the_sizes_of_its_checkpoint(data, monkeypatch, resume):
    s = replace(data, **STEP | dict(checkpoint_every=2))
    ran(s, Cards(2**40), MICROBATCHES=16)
    *_, before, newest = sorted(Path(s.log_dir).glob("*/step_*.safetensors"))
    newest.unlink()
    s = replace(s, resume="auto" if resume == "auto" else str(before))
    assert train_gpt.read_saved_sizes(s) == dict(microbatches=16, val_slice_tokens=64)
    assert train_gpt.read_saved_sizes(replace(s, num_heads=4)) == {}
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "read_source", lambda: "another script")
        assert (train_gpt.read_saved_sizes(s) == {}) == (resume == "auto"), "auto would not go on from it"
    said = ran(s, Cards(2**40), MICROBATCHES=None)
    assert "; as in the checkpoint: MICROBATCHES=16\n" in said
    assert re.search(r"^resumed: .*, step 4, ", said, re.M) and "\nstep:6/6 " in said


def test_a_file_that_is_no_checkpoint_has_no_sizes(small, tmp_path):
    """As one of torch.save: a header of so many bytes would not fit into memory."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x04" + bytes(range(100)))
    assert train_gpt.read_saved_sizes(replace(small, resume=str(path))) == {}
    with pytest.raises(train_gpt.UserError, match="a whole checkpoint, found a file of another kind"):
        train_gpt.read_safetensors(path)


def test_the_estimate_is_of_the_stages_that_are_trained(small):
    """Of three stages, one step trains the first, and another is only validated."""
    s = replace(small, num_iterations=1, batch_tokens=(512, 1024, 2048))
    one = replace(small, num_iterations=1)
    card = Card("a card", 80 * GIB, HOPPER)
    expected = train_gpt.estimate_memory(one, 1, card)[0]
    assert train_gpt.estimate_memory(s, 1, card)[0] == pytest.approx(expected, rel=0.02)


def test_a_checkpoint_decides_both_sizes(monkeypatch):
    saved = dict(microbatches=32, val_slice_tokens=65_536)
    monkeypatch.setattr(train_gpt, "read_saved_sizes", lambda s: saved)
    fitted = train_gpt.fit_memory(preset("speedrun"), [], 1, [Card("a card", 80 * GIB, HOPPER)])
    assert fitted.settings == preset("speedrun", **saved)
    assert fitted.about[0].endswith("; as in the checkpoint: MICROBATCHES=32, VAL_SLICE_TOKENS=65536")
