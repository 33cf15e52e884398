"""Settings: presets, the environment, what is told of wrong ones, --help and --dry-run."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import launch, overrides, ran

import train_gpt
from train_gpt import Settings, UserError, read_settings


def settings(preset="speedrun", **environ):
    return read_settings(dict(PRESET=preset, **environ))[0]


def problems(preset="speedrun", **environ):
    with pytest.raises(UserError) as error:
        settings(preset, **environ)
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


# ---- Presets and the environment

def test_the_speedrun_is_the_published_race():
    s = settings()
    assert s == Settings()
    assert (s.num_iterations, s.batch_tokens, s.microbatches, s.max_seq_len) == (1705, (393_216,), 8, (2048,))
    assert (s.target_loss, s.val_loss_every, s.val_tokens, s.dtype) == (3.28, 125, 10_485_760, "bfloat16")
    assert (s.model_dim, s.num_heads, s.mlp_dim) == (768, 6, 3072)
    assert (s.vocab_size, s.padded_vocab, s.bos_id, s.attn_scale) == (50_257, 50_304, 50_256, 0.12)
    assert (s.muon_lr, s.adam_lr, s.adam_beta1, s.adam_beta2) == (0.05, 0.008, 0.8, 0.95)
    assert (s.embed_lr_mult, s.scalar_lr_mult) == (75, 5)
    assert (s.cooldown_frac, s.final_lr_frac, s.warmup_steps) == (0.45, 0.1, 30)


def test_the_demo_has_the_speedruns_network_and_the_ids_of_bytes():
    demo = settings("demo")
    for name in ("layout", "value_embeds", "window_pattern"):
        assert getattr(demo, name) == getattr(Settings(), name), name
    assert (demo.vocab_size, demo.bos_id, demo.target_loss) == (257, 256, 1.62)


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_every_preset_has_known_settings_that_fit_each_other(preset):
    assert settings(preset) == replace(Settings(), **train_gpt.PRESETS[preset])


def test_without_preset_it_is_the_demo_unless_gpu_and_shards_are_here_and_a_line_says_why(
    tmp_path, monkeypatch
):
    def chosen(gpu):
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        s, _, [line] = read_settings(dict(DATA_PATH=str(tmp_path)))
        return s.vocab_size, line

    ids, line = chosen(gpu=False)
    assert ids == 257 and "demo (no CUDA GPU and no FineWeb shards" in line and "PRESET=speedrun" in line
    assert chosen(gpu=True)[0] == 257
    (tmp_path / "data/fineweb10B").mkdir(parents=True)
    (tmp_path / "data/fineweb10B/fineweb_train_000001.bin").touch()
    assert chosen(gpu=False)[0] == 257
    ids, line = chosen(gpu=True)
    assert ids == 50_257 and line.startswith("preset: speedrun") and "PRESET=demo" in line


SAMPLES = dict(  # values that fit the speedrun, where an arbitrary one would contradict another setting
    device="cpu", dtype="float32", resume="auto", nproc="4", val_tokens="524288", val_slice_tokens="1048576",
    batch_tokens="1280,2560", microbatches="4", layout="M " * 11 + "A", value_embeds="." * 12, bos_id="5",
    window_pattern="L" * 12, window_schedule="2,5", stage_starts="0,3", stage_lr_factors="1.0,1.5",
    max_seq_len="99,98", model_dim="96", num_heads="3", gate_channels="0", vocab_size="50304",
    ngram_max="3", key_offset="1", equal_qk_start="1", network="frontier", token_weights="1.0,0.5",
)


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)])
def test_every_setting_is_read_from_the_environment(name):
    """And no other setting is changed by it."""
    kind = type(getattr(Settings(), name))
    text = SAMPLES.get(name) or {int: "7", float: "0.5", bool: "0", str: "x"}[kind]
    together = dict(layout=dict(VALUE_EMBEDS="." * 12), equal_qk_start=dict(KEY_OFFSET="1")).get(name, {})
    if kind is tuple:
        more = {"WINDOW_SCHEDULE": "5,6", "NETWORK": "frontier" if name == "token_weights" else "gpt"}
        s, changed, _ = read_settings({"PRESET": "speedrun", **more, name.upper(): text})
        assert train_gpt.setting_text(getattr(s, name)) == text and name in changed
        return
    s, changed, _ = read_settings({"PRESET": "speedrun", name.upper(): text} | together)
    value = text == "1" if kind is bool else kind(text)
    assert value != getattr(Settings(), name), "it must differ from the default"
    assert s == replace(settings(**together), **{name: value}) and name in changed


@pytest.mark.parametrize("layout, stages", [
    ("AM", [["A0", "M0"]]), ("A M", [["A0"], ["M0"]]), ("A+M MM", [["A0+M0"], ["M1", "M2"]]),
    ("A+MM  A+M+A", [["A0+M0", "M1"], ["A1+M2+A2"]]),
])
def test_a_word_of_the_layout_says_what_a_block_does_in_turn_and_side_by_side(layout, stages):
    words = len(layout.split())
    s = settings(LAYOUT=layout, VALUE_EMBEDS="0."[:words], WINDOW_PATTERN="SL"[:words])
    blocks = train_gpt.parse_layout(s)
    found = [["+".join(f"{kind}{number}" for kind, number in parts) for parts in block.sublayers]
             for block in blocks]
    assert found == stages
    assert [block.skip_from for block in blocks] == [None, 0][:words]
    assert [block.value_embed for block in blocks] == [0, None][:words]
    assert [block.long_window for block in blocks] == [False, True][:words]


# ---- Wrong ones

@pytest.mark.parametrize("name, value, expected", [
    ("NUM_ITERATIONS", "0", "a whole number of at least 1"),
    ("NUM_ITERATIONS", "1.5", "a whole number of at least 1"),
    ("NUM_ITERATIONS", "3000000000", "a whole number of at least 1"),
    ("SEED", "-1", "a whole number of at least 0"),
    ("MUON_LR", "nan", "a number of at least 0"),
    ("MUON_LR", "-0.1", "a number of at least 0"),
    ("TORCH_COMPILE", "maybe", "0 or 1"),
    ("DEVICE", "tpu", "auto, cuda or cpu"),
    ("PRESET", "fast", "one of speedrun, demo, proxy, frontier"),
    # what does not fit another setting
    ("LAYOUT", "A AM A+ AM AM AM AM M AM AM AM AM", "words such as A, M, AM and A+M"),
    ("LAYOUT", "A AM AM X AM AM AM M AM AM AM AM", "words such as A, M, AM and A+M"),
    ("LAYOUT", "A A A A A A A A A A A A", "at least one A and one M"),
    ("VALUE_EMBEDS", "012", "a digit or a dot for each of the 12 words of LAYOUT"),
    ("VALUE_EMBEDS", ".......0....", "a dot for the blocks without attention, [7]"),
    ("WINDOW_PATTERN", "LLLLLLLLLLLX", "L or S for each of the 12 words of LAYOUT"),
    ("WINDOW_SCHEDULE", "3,1", "at least 2"),
    ("BOS_ID", "50257", "an id below VOCAB_SIZE=50257"),
    ("BATCH_TOKENS", "1000", "a multiple of 16 x MICROBATCHES = 128"),
    ("BATCH_TOKENS", "128,256,1000", "a multiple of 16 x MICROBATCHES = 128"),
    ("BATCH_TOKENS", "128,256", "one value, or one for each of the 3 stages"),
    ("BATCH_TOKENS", "", "a whole number of at least 1"),
    ("MAX_SEQ_LEN", "8,,9", "a whole number of at least 1"),
    ("STAGE_STARTS", "0,5", "one value for each of the 3 stages, or none"),
    ("STAGE_STARTS", "1,5,9", "steps that begin with 0 and grow"),
    ("STAGE_STARTS", "0,9,5", "steps that begin with 0 and grow"),
    ("STAGE_STARTS", "0,9,5000", "steps up to NUM_ITERATIONS=1705"),
    ("STAGE_LR_FACTORS", "1,2", "one value, or one for each of the 3 stages"),
    ("COOLDOWN_FRAC", "45", "a number from 0 to 1"),
    ("FINAL_LR_FRAC", "1.5", "a number from 0 to 1"),
    ("ATTN_SCALE", "0", "a number above 0"),
    ("VAL_TOKENS", "1000", "a multiple of VAL_SLICE_TOKENS=262144"),
    ("NUM_HEADS", "7", "a multiple of 4 x NUM_HEADS = 28"),
    ("GATE_CHANNELS", "769", "at most MODEL_DIM=768"),
    ("NGRAM_MAX", "6", "2 to 5"),
    ("EQUAL_QK_START", "1", "0, or KEY_OFFSET=1 beside it"),
    ("MUON_MOMENTUM_END", "1", "a number from 0 to below 1"),
    ("ADAM_BETA2", "1", "a number from 0 to below 1"),
    ("NPROC", "3", "can share MICROBATCHES=8, "),
    ("NPROC", "256", " 128, 192, 384), found 256."),
])
def test_a_wrong_value_or_one_that_fits_no_other_is_one_sentence(name, value, expected):
    (line,) = problems(**(dict(preset=value) if name == "PRESET" else {name: value}))
    assert expected in line and re.search(r"^[A-Z0-9_]+: expected .+, found .+\.$", line.replace("; ", ", "))


@pytest.mark.parametrize("environ, name", [
    (dict(BATCH_TOKENS="5k", MICROBATCHES="7"), "BATCH_TOKENS"),
    (dict(VOCAB_SIZE="many", BOS_ID="60000"), "VOCAB_SIZE"),
    (dict(preset="dmeo", VOCAB_SIZE="300"), "PRESET"),
])
def test_what_stands_in_for_a_wrong_value_contradicts_nothing(environ, name):
    assert [line.split(":")[0] for line in problems(**environ)] == [name]


@pytest.mark.parametrize("name, meant", [
    ("NUM_ITERATION", "NUM_ITERATIONS"),
    ("num_iterations", "NUM_ITERATIONS"),
    ("TRAGET_LOSS", "TARGET_LOSS"),
    ("PRESETS", "PRESET"),
    ("DEVICES", "DEVICE"),
])
def test_a_name_that_is_nearly_a_settings_is_refused(name, meant):
    (line,) = problems(**{name: "1"})
    assert line == f"{name}: unknown setting; did you mean {meant}? Otherwise unset {name}."


@pytest.mark.parametrize("name, value, meant", [
    ("MODEL_DIR", "/opt/ml/model", "MODEL_DIM"),
    ("MODEL_DIR", "models", "MODEL_DIM"),
    ("LOGDIR", "/var/log", "LOG_DIR"),
    ("DATAPATH", "/data", "DATA_PATH"),
])
def test_a_near_miss_that_is_rather_another_programs_is_a_warning(name, value, meant):
    """A folder that many programs have, or a text where the setting has a number."""
    s, changed, [_, line] = read_settings({"PRESET": "speedrun", name: value})
    assert (s, changed) == (Settings(), [])
    expected = f"{name}: WARNING: unknown setting; did you mean {meant}? Otherwise leave {name} as it is."
    assert line == expected


@pytest.mark.parametrize("name, value", [
    ("MODEL_DIR", "512"), ("NUM_ITERATION", "2e3"), ("BATCH_TOKEN", "1,2"), ("DEVICES", "cpu"),
    ("RESUMES", "auto"), ("TRAIN_FILE", "/data/*.bin"), ("TORCH_COMPILED", "true"),
])
def test_a_near_miss_that_could_be_meant_is_refused(name, value):
    (line,) = problems(**{name: value})
    assert line.startswith(f"{name}: unknown setting; did you mean ")


@pytest.mark.parametrize("own, other", [("TRAIN_FILES", "VAL_FILES"), ("VAL_FILES", "TRAIN_FILES")])
def test_one_of_the_two_patterns_without_the_other_is_a_warning(own, other):
    line = read_settings({"PRESET": "speedrun", own: "x"})[2][1]
    assert line == (f"{own}: WARNING: set without {other}, which is {getattr(Settings(), other.lower())}: "
                    "training and validation may be on different texts")
    assert len(read_settings({"PRESET": "speedrun", own: "x", other: "y"})[2]) == 1


def test_warnings_on_settings_stand_in_the_plan_on_the_console_and_in_the_log(data, run_main):
    warning = "\nMODEL_DIR: WARNING: unknown setting;"
    assert warning in run_main("--dry-run", MODEL_DIR="/x", **overrides(data))[1]
    assert warning in ran(data, MODEL_DIR="/x")
    [log] = Path(data.log_dir).glob("*/log.txt")
    assert warning in log.read_text(encoding="utf-8")


def test_all_that_is_wrong_is_told_at_once_with_exit_code_2_and_nothing_is_done(tmp_path, run_main):
    wrong = dict(NUM_ITERATION=3, SEED="x", LAYOUT="B", MICROBATCHES=7)
    code, shown, said = run_main(PRESET="speedrun", LOG_DIR=tmp_path / "logs", **wrong)
    assert (code, shown) == (2, "") and not (tmp_path / "logs").exists()
    expected = {"NUM_ITERATION", "SEED", "LAYOUT", "BATCH_TOKENS", "VALUE_EMBEDS", "WINDOW_PATTERN"}
    assert {line.split(":")[0] for line in said.splitlines()} == expected


@pytest.mark.parametrize("changes, expected", [
    (dict(DEVICE="cuda"), "DEVICE: expected a CUDA GPU for each process (1), found 0; set DEVICE=cpu."),
    (dict(WORLD_SIZE=3, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=3, MASTER_ADDR="here", MASTER_PORT=1),
     "NPROC: expected a number of ranks that can share MICROBATCHES="),
])
def test_an_impossible_launch_is_one_sentence(changes, expected, run_main, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, shown, said = run_main(PRESET="demo", **changes)
    assert (code, shown, said.count("\n")) == (2, "", 1) and said.startswith(expected)


# ---- --help and --dry-run

def test_help_shows_every_setting_with_default_and_meaning_and_the_demos():
    """Also where Python drops docstrings and asserts."""
    done = launch("--help", PYTHONOPTIMIZE=2)
    assert done.returncode == 0 and "PRESET=frontier changes:" in done.stdout
    for f in fields(Settings):
        (default,) = re.findall(rf"^ +{f.name}: \w+ = (.+?)  # \S.+$", done.stdout, re.M)
        assert eval(default) == f.default, f.name
    for name, value in [*train_gpt.PRESETS["demo"].items(), *train_gpt.PRESETS["frontier"].items()]:
        assert f"\n    {name} = {value!r}\n" in done.stdout + "\n"


def test_dry_run_shows_the_plan_and_does_nothing_else(tmp_path, data, run_main, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run does none of this")

    for name in ("dist.init_process_group", "init_weights", "train_batches", "Log", "train"):
        monkeypatch.setattr(f"train_gpt.{name}", refuse)
    s = replace(data, muon_lr=0.02)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    code, shown, said = run_main("--dry-run", **overrides(s))
    assert (code, said) == (0, "") and {path: path.read_bytes() for path in tmp_path.rglob("*")} == before

    title, *lines, preset, device, batch, parameters, tokens, end = shown.splitlines()
    assert end == "dry run: settings and data can be used"
    assert preset == "preset: speedrun, set by PRESET" and device == "device: cpu (as DEVICE says)"
    changed = {name.lower() for name in overrides(s)} - {"preset"}
    assert title == "settings:" and len(lines) == len(fields(Settings))
    for line, f in zip(lines, fields(Settings)):
        mark = "  (overridden)" * (f.name in changed)
        assert line == f"  {f.name}: {train_gpt.setting_text(getattr(s, f.name))}{mark}"
    assert batch == "batch: 1 rank x 8 microbatches x 64 tokens = 512 tokens/step"
    counts = [(name, p.numel()) for name, p in train_gpt.GPT(s, train_gpt.Kernels()).named_parameters()]
    assert parameters == (f"parameters: {sum(count for _, count in counts):,} = "
                          + " + ".join(f"{count:,} {name}" for name, count in counts))
    available = train_gpt.TokenShard(tmp_path / "train_0.bin", s).num_tokens
    assert tokens.startswith(f"data: {available:,} tokens in 1 shard; the run reads ")


def test_dry_run_plans_as_many_ranks_as_gpus_and_batch_allow(data, run_main, pretend_gpus):
    for gpus, ranks in ((1, 1), (3, 2), (7, 4), (8, 8), (10, 8)):
        pretend_gpus(gpus)
        s = replace(data, device="auto", nproc=0)
        code, shown, said = run_main("--dry-run", **overrides(s), NPROC=None)
        shares = f"{train_gpt.counted(ranks, 'rank')} x {train_gpt.counted(8 // ranks, 'microbatch')} x "
        assert (code, said) == (0, "") and f"\nbatch: {shares}" in shown
        assert "\nmemory: 0.0 GiB in training and 0.0 GiB in validation, by an estimate, of 80.0 GiB" in shown


@pytest.mark.parametrize("environ, name", [
    (dict(WORLD_SIZE=8), "RANK"),
    (dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0), "LOCAL_WORLD_SIZE"),
    (dict(WORLD_SIZE=2, RANK="one", LOCAL_RANK=0, LOCAL_WORLD_SIZE=2), "RANK"),
    (dict(WORLD_SIZE="", RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2), "WORLD_SIZE"),
    (dict(WORLD_SIZE=2, RANK=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2), "RANK"),
    (dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2), "MASTER_ADDR"),
    (dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_ADDR="here"), "MASTER_PORT"),
    (dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_ADDR="here", MASTER_PORT="x"),
     "MASTER_PORT"),
])
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_launchers_variable_that_is_missing_or_wrong_is_one_sentence(
    data, run_main, environ, name, arguments
):
    code, shown, said = run_main(*arguments, **overrides(data) | environ)
    assert (code, shown, said.count("\n")) == (2, "", 1) and said.startswith(f"{name}: expected ")
    assert said.endswith("start with torchrun, or unset WORLD_SIZE.\n")
