"""Settings: the presets, overrides from the environment, and how wrong ones are reported."""

import re
import time
from dataclasses import fields, replace

import pytest
from conftest import ROOT, launch, overrides

import train_gpt
from train_gpt import (
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
    demo, _ = resolve_settings({}, "demo")
    for name in ("num_layers", "skip_attn", "skip_mlp", "value_embeds", "window_pattern", "gate_channels"):
        assert getattr(demo, name) == getattr(Settings(), name), name
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
        ("ADAM_EPS", "0", "a number of at least 1e-30"),
        ("NPROC", "x", "a whole number of at least 0"),
        ("NPROC", "3", "a divisor of MICROBATCHES=8"),
        ("TRAIN_FILES", "", "a pattern of file names"),
        ("VOCAB_SIZE", "70000", "at most 65536"),
        ("TORCH_COMPILE", "maybe", "one of 1, 0"),
        ("DEVICE", "tpu", "one of auto, cuda, cpu"),
        ("BOS_ID", "60000", "below VOCAB_SIZE=50257"),
        ("BATCH_TOKENS", "1001", "a multiple of MICROBATCHES=8"),
        ("VAL_TOKENS", "1000", "a multiple of VAL_SLICE_TOKENS"),
        ("NUM_HEADS", "7", "a multiple of 4 x NUM_HEADS = 28"),
        ("SKIP_MLP", "0,12", "different block numbers below NUM_LAYERS=12"),
        ("SKIP_MLP", "0,0", "different block numbers"),
        ("SKIP_MLP", "-1", "different block numbers"),
        ("SKIP_ATTN", "seven", "different block numbers below NUM_LAYERS=12"),
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


@pytest.mark.parametrize(
    "name, text, value",
    [("DEVICE", "CPU", "cpu"), ("DTYPE", "BFLOAT16", "bfloat16"), ("TORCH_COMPILE", "No", False)],
)
def test_words_to_choose_from_may_be_written_in_capitals(name, text, value):
    assert getattr(resolve_settings({name: text}, "speedrun")[0], name.lower()) == value


@pytest.mark.parametrize(
    "preset, environ, name",
    [
        ("speedrun", dict(BATCH_TOKENS="5k", MICROBATCHES="7"), "BATCH_TOKENS"),
        ("speedrun", dict(VOCAB_SIZE="many", BOS_ID="60000"), "VOCAB_SIZE"),
        ("dmeo", dict(VOCAB_SIZE="300"), "PRESET"),
    ],
)
def test_what_stands_in_for_a_wrong_value_contradicts_nothing(preset, environ, name):
    assert [line.split(":")[0] for line in problems(preset, **environ)] == [name]


def test_all_problems_are_reported_at_once():
    lines = problems(SEED="x", NUM_ITERATION="3", SKIP_MLP="99", MICROBATCHES="7")
    assert [line.split(":")[0] for line in lines] == ["NUM_ITERATION", "SEED", "BATCH_TOKENS", "SKIP_MLP"]


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
        ("NPROCS", "NPROC"),
        ("PRESETS", "PRESET"),
        ("NUM_ITER", "NUM_ITERATIONS"),
        ("VAL_LOSS_", "VAL_LOSS_EVERY"),
    ],
)
def test_a_name_that_is_nearly_a_setting_is_refused(name, meant):
    assert problems(**{name: "1"}) == [
        f"{name}: unknown setting; did you mean {meant}? Otherwise unset {name}."
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
    "world_size, microbatches, microbatch_tokens, per_rank",
    [
        (1, 8, 49_152, 8),
        (2, 8, 49_152, 4),
        (4, 8, 49_152, 2),
        (8, 8, 49_152, 1),
        (12, 12, 32_768, 1),
        (16, 16, 24_576, 1),
    ],
)
def test_a_step_is_the_same_tokens_at_every_world_size(world_size, microbatches, microbatch_tokens, per_rank):
    plan = plan_batch(Settings(), world_size)
    assert plan == (microbatches, microbatch_tokens, per_rank, world_size)
    assert str(plan).endswith("= 393,216 tokens/step") and f"x {microbatch_tokens:,} tokens" in str(plan)


def test_run_sh_uses_as_many_gpus_as_the_batch_allows():
    assert [largest_world_size(Settings(), n) for n in (0, 1, 2, 3, 4, 7, 8, 10)] == [1, 1, 2, 2, 4, 4, 8, 8]


def test_help_shows_unit_meaning_choices_and_default_of_every_setting_and_the_preset():
    done = launch("--help")
    assert done.returncode == 0
    for f in fields(Settings):
        unit, choices = f.metadata["unit"], f.metadata["choices"]
        default = repr(int(f.default) if f.type is bool else f.default)
        entry = f"\n  {f.name.upper()}" + (f" [{unit}]" if unit else "") + f"\n      {f.metadata['meaning']}"
        entry += f" (one of {', '.join(choices)})" if choices else ""
        assert entry + f"\n      default: {default}" in done.stdout, f.name
    assert "\n  NUM_ITERATIONS [steps]\n" in done.stdout
    assert "default: 1705, in the demo 108\n" in done.stdout
    assert "\n  PRESET\n      speedrun or demo\n      default: " in done.stdout


def test_wrong_settings_end_the_run_within_5_seconds_with_exit_code_2_and_a_sentence_each(tmp_path):
    wrong = dict(NUM_ITERATION=3, SEED="x", NPROC="x", NUM_ITERATIONS="x", SKIP_MLP="99")
    for _ in range(2):  # a second try, for machines are noisy
        begun = time.monotonic()
        done = launch(**wrong, PRESET="speedrun", LOG_DIR=tmp_path / "logs")
        seconds = time.monotonic() - begun
        if seconds < 5:
            break
    assert seconds < 5
    assert done.returncode == 2 and done.stdout == ""
    assert sorted(line.split(":")[0] for line in done.stderr.splitlines()) == sorted(wrong)
    assert not (tmp_path / "logs").exists()


def test_dry_run_shows_the_plan_of_the_speedrun_and_what_its_data_lack(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: name)  # a compiler, which no dry run uses
    code, shown, said = run_main(
        "--dry-run", PRESET="speedrun", DEVICE="cpu", SKIP_MLP="0,11", DATA_PATH=tmp_path
    )
    assert "\noverridden: DATA_PATH, DEVICE, SKIP_MLP\n" in shown
    assert "\n  skip_mlp: '0,11'  (overridden)\n" in shown
    assert "1 rank x 8 microbatches x 49,152 tokens = 393,216 tokens/step" in shown
    assert "parameters: 266,306,388 = 38,633,472 embed + 115,900,416 value_embeds" in shown
    assert code == 1 and "found none" in said and "data/cached_fineweb10B.py" in said


def test_dry_run_says_what_a_run_would_do_and_does_none_of_it(tmp_path, data, run_main, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run does none of this")

    for name in ("torch.compile", "dist.init_process_group", "init_weights", "train"):
        monkeypatch.setattr(f"train_gpt.{name}", refuse)
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: name)
    s = replace(data, torch_compile=True, muon_lr=0.02)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    code, shown, said = run_main("--dry-run", **overrides(s))
    assert (code, said) == (0, "") and {path: path.read_bytes() for path in tmp_path.rglob("*")} == before

    preset, device, title, *lines, overridden, batch, parameters, memory, tokens = shown.splitlines()
    assert preset == "preset: speedrun, as PRESET says" and device == "device: cpu, as DEVICE says"
    changed = {name.lower() for name in overrides(s)} - {"preset"}
    assert title == "settings:" and len(lines) == len(fields(Settings))
    for line, f in zip(lines, fields(Settings)):
        mark = "  (overridden)" if f.name in changed else ""
        assert line == f"  {f.name}: {getattr(s, f.name)!r}{mark}"
    assert overridden == "overridden: " + ", ".join(sorted(changed)).upper()
    assert batch == "batch: 1 rank x 8 microbatches x 64 tokens = 512 tokens/step"
    total, groups = parameters.removeprefix("parameters: ").split(" = ")
    model = train_gpt.GPT(s, train_gpt.plain_kernels())
    counts = [f"{p.numel():,} {name}" for name, p in model.named_parameters()]
    assert groups.split(" + ") == counts and total == f"{sum(p.numel() for p in model.parameters()):,}"
    assert re.match(r"memory a rank, estimated .*: \d MB = \d parameters \+ \d gradients \+ ", memory)
    available = train_gpt.TokenShard(tmp_path / "train_0.bin", s).num_tokens
    assert tokens.startswith(f"data: 3,072 tokens needed, {available:,} available in 1 shard; 6 steps take ")


@pytest.mark.parametrize(
    "arguments, changes, expected",
    [
        (["--dry-run"], dict(DEVICE="cuda"), "DEVICE: expected a CUDA GPU"),
        (["--nproc"], dict(NPROC="3"), "MICROBATCHES=8"),
        (["--nproc"], dict(NPROC="zero"), "NPROC: expected a whole number"),
        (["--nproc"], dict(DATA_PATH="/no/such"), "DATA_PATH: expected a folder, found none at /no/such;"),
        ([], dict(RANK="0"), "RANK=0"),
        ([], dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"), "found RANK=2"),
        ([], dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2"), "MASTER_ADDR, MASTER_"),
    ],
)
def test_an_impossible_launch_is_one_sentence(arguments, changes, expected, tmp_path, run_main, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, shown, said = run_main(*arguments, **dict(LOG_DIR=tmp_path, PRESET="demo") | changes)
    assert (code, shown, said.count("\n")) == (2, "", 1) and expected in said


def test_without_a_compiler_torch_compile_is_refused_and_may_be_turned_off(data, run_main, monkeypatch):
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: None)
    code, _, said = run_main("--nproc", **overrides(replace(data, torch_compile=True)))
    assert code == 2 and said.startswith("TORCH_COMPILE: expected a compiler") and "TORCH_COMPILE=0" in said
    assert run_main("--nproc", **overrides(data)) == (0, "1\n", "")


def test_importing_the_script_has_no_effect(tmp_path):
    (tmp_path / "train_gpt.py").write_bytes((ROOT / "train_gpt.py").read_bytes())
    program = tmp_path / "program.py"
    program.write_text(
        "import os, threading, torch\n"
        "before = sorted(os.listdir()), threading.active_count(), dict(os.environ)\n"
        "import train_gpt\n"
        "assert train_gpt.__file__ == os.path.abspath('train_gpt.py')\n"
        "assert before == (sorted(os.listdir()), threading.active_count(), dict(os.environ))\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
    )
    done = launch(script=program, cwd=tmp_path, PYTHONDONTWRITEBYTECODE=1)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"train_gpt.py", "program.py"}
