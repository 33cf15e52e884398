"""Settings: the presets, overrides from the environment, and how wrong ones are reported."""

import re
import time
from dataclasses import fields

import pytest
from conftest import ROOT, launch

from train_gpt import (
    PRESETS,
    Settings,
    UserError,
    choose_preset,
    largest_world_size,
    plan_batch,
    resolve_settings,
)


def problems(preset="speedrun", **environ):
    with pytest.raises(UserError) as error:
        resolve_settings(environ, preset)
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


def test_the_speedrun_preset_is_the_published_race():
    s, overrides = resolve_settings({}, "speedrun")
    assert overrides == {}
    assert (s.num_iterations, s.batch_tokens, s.microbatches, s.max_piece_tokens) == (1705, 393_216, 8, 2048)
    assert (s.target_loss, s.val_loss_every, s.val_tokens, s.val_slice_tokens) == (
        3.28,
        125,
        10_485_760,
        262_144,
    )
    assert (s.num_layers, s.model_dim, s.num_heads, s.head_dim, s.mlp_dim) == (12, 768, 6, 128, 3072)
    assert (s.vocab_size, s.padded_vocab, s.bos_id, s.attn_scale) == (50_257, 50_304, 50_256, 0.12)
    assert (s.muon_lr, s.adam_lr, s.adam_beta1, s.adam_beta2, s.adam_eps) == (0.05, 0.008, 0.8, 0.95, 1e-10)
    assert (s.embed_lr_mult, s.head_lr_mult, s.scalar_lr_mult) == (75, 1, 5)
    assert (s.warmup_steps, s.dtype, s.cooldown_frac, s.final_lr_frac) == (30, "bfloat16", 0.45, 0.1)


def test_the_demo_keeps_every_feature_of_the_speedrun():
    kept = (
        "num_layers",
        "skip_attn",
        "skip_mlp",
        "value_embeds",
        "window_pattern",
        "gate_channels",
        "microbatches",
    )
    assert not set(kept) & set(PRESETS["demo"]) - {"microbatches"}
    demo, _ = resolve_settings({}, "demo")
    assert [getattr(demo, name) for name in kept] == [getattr(Settings(), name) for name in kept]
    assert (demo.vocab_size, demo.bos_id, demo.target_loss) == (257, 256, 1.70)


def test_every_setting_is_overridden_by_its_name_in_capitals():
    samples = {int: "7", float: "0.5", bool: "0", str: "x"}
    for f in fields(Settings):
        text = f.metadata["choices"][-1] if f.metadata["choices"] else samples[f.type]
        try:
            s, overrides = resolve_settings({f.name.upper(): text}, "speedrun")
        except UserError as error:  # on its own it contradicts another setting: it was read, then
            assert f"found {f.type(text)!r}" in str(error) or f.name.upper() in str(error)
            continue
        assert overrides == {f.name: text}
        assert str(getattr(s, f.name)) == {"7": "7", "0.5": "0.5", "0": "False"}.get(text, text)


def test_an_ablation_is_an_override():
    s, _ = resolve_settings({"SKIP_MLP": "0,11", "VALUE_EMBEDS": ".012....012.", "SKIP_ATTN": ""}, "speedrun")
    assert [b.mlp for b in s.blocks] == [None, *range(10), None]
    assert [b.attn for b in s.blocks] == list(range(12))
    assert [b.table for b in s.blocks] == [None, 0, 1, 2, None, None, None, None, 0, 1, 2, None]


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("NUM_ITERATIONS", "many", "a whole number of at least 1"),
        ("NUM_ITERATIONS", "0", "a whole number of at least 1"),
        ("NUM_ITERATIONS", "1.5", "a whole number of at least 1"),
        ("NUM_ITERATIONS", "", "a whole number of at least 1"),
        ("MUON_LR", "nan", "a number of at least 0"),
        ("MUON_LR", "inf", "a number of at least 0"),
        ("MUON_LR", "fast", "a number of at least 0"),
        ("ADAM_BETA1", "1", "at most 0.9999"),
        ("VOCAB_SIZE", "70000", "at most 65536"),
        ("TORCH_COMPILE", "maybe", "one of 1, 0"),
        ("DEVICE", "tpu", "one of auto, cuda, cpu"),
        ("BOS_ID", "60000", "below VOCAB_SIZE=50257"),
        ("BATCH_TOKENS", "1001", "a multiple of MICROBATCHES=8"),
        ("VAL_TOKENS", "1000", "a multiple of VAL_SLICE_TOKENS"),
        ("NUM_HEADS", "7", "a multiple of 4 x NUM_HEADS = 28"),
        ("SKIP_MLP", "0,12", "block numbers from 0 to 11"),
        ("SKIP_MLP", "0,0", "different block numbers"),
        ("SKIP_ATTN", "seven", "block numbers from 0 to 11"),
        ("VALUE_EMBEDS", "012", "NUM_LAYERS=12"),
        ("VALUE_EMBEDS", "02..........", "without a gap"),
        ("VALUE_EMBEDS", ".......0....", ". for block 7"),
        ("WINDOW_PATTERN", "LLLLLLLLLLLX", "a character out of LS"),
        ("WINDOW_SCHEDULE", "3,1", "at least 2"),
        ("WINDOW_SCHEDULE", "", "at least 2"),
        ("GATE_CHANNELS", "769", "at most MODEL_DIM=768"),
    ],
)
def test_a_wrong_value_gets_one_sentence_with_name_expected_and_found(name, value, expected):
    lines = problems(**{name: value})
    assert len(lines) == 1
    assert expected in lines[0] and re.search(r"expected .*, found .*\.$", lines[0])


def test_all_problems_are_reported_at_once():
    lines = problems(SEED="x", NUM_ITERATION="3", SKIP_MLP="99", MICROBATCHES="7")
    assert len(lines) == 4
    for name in ("SEED", "NUM_ITERATION", "SKIP_MLP", "BATCH_TOKENS"):
        assert any(line.startswith(name + ":") for line in lines)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("NUM_ITERATION", "NUM_ITERATIONS"),
        ("NUMITERATIONS", "NUM_ITERATIONS"),
        ("num_iterations", "NUM_ITERATIONS"),
        ("VAL_LOSS_EVRY", "VAL_LOSS_EVERY"),
        ("TRAGET_LOSS", "TARGET_LOSS"),
        ("SKIP_MLPS", "SKIP_MLP"),
        ("seed", "SEED"),
    ],
)
def test_a_name_that_is_nearly_a_setting_is_refused(name, meant):
    assert problems(**{name: "1"}) == [
        f"{name}: no such setting; if {meant} was meant, write that, else unset {name}."
    ]


def test_names_that_have_nothing_to_do_with_settings_are_left_alone():
    others = [
        "PATH",
        "HOME",
        "SHELL",
        "TERM",
        "LANG",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "NCCL_DEBUG",
        "TORCH_LOGS",
        "TORCH_COMPILE_DEBUG",
        "TYPE",
        "SPEED",
        "COMPILER",
        "MASTER_ADDR",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "TORCHELASTIC_RUN_ID",
        "HF_TOKEN",
        "VIRTUAL_ENV",
        "NPROC",
        "COLUMNS",
        "WINDOWID",
        "PRESET",
    ]
    assert resolve_settings(dict.fromkeys(others, "x"), "speedrun")[0] == Settings()


def test_an_unknown_preset_is_refused():
    assert problems(preset="fast") == ["PRESET: expected one of speedrun, demo, found 'fast'."]


def test_the_preset_left_out_is_the_demo_without_gpu_or_shards_and_says_how_to_get_the_other(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    name, why = choose_preset({"DATA_PATH": str(tmp_path)})
    assert name == "demo" and "no CUDA GPU and no FineWeb shards" in why and "PRESET=speedrun" in why
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_preset({"DATA_PATH": str(tmp_path)})[0] == "demo"
    (tmp_path / "data/fineweb10B").mkdir(parents=True)
    (tmp_path / "data/fineweb10B/fineweb_train_000001.bin").touch()
    name, why = choose_preset({"DATA_PATH": str(tmp_path)})
    assert name == "speedrun" and "PRESET=demo" in why
    assert choose_preset({"PRESET": "demo", "DATA_PATH": str(tmp_path)})[0] == "demo"


@pytest.mark.parametrize(
    "world_size, slots, slot_tokens, per_rank",
    [
        (1, 8, 49_152, 8),
        (2, 8, 49_152, 4),
        (4, 8, 49_152, 2),
        (8, 8, 49_152, 1),
        (16, 16, 24_576, 1),
    ],
)
def test_a_step_is_the_same_tokens_at_every_world_size(world_size, slots, slot_tokens, per_rank):
    plan = plan_batch(Settings(), world_size)
    assert plan == (slots, slot_tokens, per_rank, world_size)
    assert str(plan).endswith("= 393,216 tokens/step") and f"x {slot_tokens:,} tokens" in str(plan)


@pytest.mark.parametrize("world_size", [3, 5, 6, 7, 12, 20])
def test_a_world_size_that_does_not_fit_the_batch_is_refused(world_size):
    if world_size == 12:  # more ranks than microbatches, and they divide the tokens
        assert plan_batch(Settings(), 12).slot_tokens * 12 == 393_216
        return
    with pytest.raises(UserError, match=f"MICROBATCHES=8.*found {world_size}.*NPROC"):
        plan_batch(Settings(), world_size)


def test_run_sh_uses_as_many_gpus_as_the_batch_allows():
    assert [largest_world_size(Settings(), n) for n in (0, 1, 2, 3, 4, 7, 8, 10)] == [1, 1, 2, 2, 4, 4, 8, 8]


def test_help_lists_every_setting_with_default_and_meaning():
    shown = launch("--help").stdout
    for f in fields(Settings):
        assert re.search(
            rf"^  {f.name.upper()}\n      .*{re.escape(f.metadata['meaning'])}\n      default "
            rf"{re.escape(repr(f.default))}",
            shown,
            re.M,
        ), f.name


def test_wrong_settings_end_the_run_within_seconds_with_exit_code_2(tmp_path):
    begun = time.monotonic()
    done = launch(NUM_ITERATION=3, SEED="x", LOG_DIR=tmp_path / "logs")
    assert (
        done.returncode == 2 and time.monotonic() - begun < 60
    )  # said within 5 s; this bound only ends a hang
    assert done.stdout == "" and len(done.stderr.splitlines()) == 2
    assert not (tmp_path / "logs").exists()


def test_dry_run_shows_the_plan_of_the_speedrun_and_what_its_data_lack(tmp_path):
    done = launch("--dry-run", PRESET="speedrun", SKIP_MLP="0,11", DATA_PATH=tmp_path)
    assert (
        "overridden: DATA_PATH, SKIP_MLP" in done.stdout and "skip_mlp: '0,11'  (overridden)" in done.stdout
    )
    assert "1 rank x 8 microbatches x 49,152 tokens = 393,216 tokens/step" in done.stdout
    assert "parameters: 266,306,388 = 38,633,472 embed + 115,900,416 value_embeds" in done.stdout
    assert done.returncode == 1 and "found none" in done.stderr and "data/cached_fineweb10B.py" in done.stderr


@pytest.mark.parametrize(
    "arguments, overrides, expected",
    [
        (["--dry-run"], dict(DEVICE="cuda"), "DEVICE: expected a CUDA GPU"),
        (["--nproc"], dict(NPROC="3"), "MICROBATCHES=8"),
        (["--nproc"], dict(NPROC="zero"), "NPROC: expected a whole number"),
        ([], dict(RANK="0"), "RANK=0"),
        ([], dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"), "found RANK=2"),
    ],
)
def test_an_impossible_launch_is_one_sentence(arguments, overrides, expected, tmp_path):
    done = launch(*arguments, CUDA_VISIBLE_DEVICES="", LOG_DIR=tmp_path, PRESET="demo", **overrides)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and expected in done.stderr


def test_importing_the_script_has_no_effect(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; torch.cuda.init = None\n"
        "import train_gpt, os, threading; import torch.distributed as dist\n"
        "assert not dist.is_initialized() and threading.active_count() == 1 and os.listdir('.') == ['p.py']"
    )
    (tmp_path / "p.py").write_text(program)
    done = launch(script=tmp_path / "p.py", cwd=tmp_path, PYTHONDONTWRITEBYTECODE=1)
    assert done.returncode == 0, done.stderr
