"""The programs for GPUs: prove.py in its small form on a CPU, and the counts of roofline.py."""

import re
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, environment, fresh_model, stage_of
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

sys.path += [str(ROOT / "records"), str(ROOT / "tests/gpu")]

import prove  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402


@pytest.mark.slow
def test_prove_runs_all_parts_small_on_a_cpu_and_leaves_a_summary_and_an_archive_with_the_logs(tmp_path):
    out = tmp_path / "prove"
    command = [sys.executable, ROOT / "tests/gpu/prove.py", "--small", "--out", out]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["prove.tar.gz", "summary.md"]
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert done.stdout.endswith(summary + "\n"), "the summary is what is printed last"
    assert summary.endswith("\n## result\n\npassed\n")
    titles = [line[3:] for line in summary.splitlines() if line.startswith("## ")]
    assert titles == ["machine", *prove.PARTS.split(","), "result"]
    rows = dict(re.findall(r"^\| (.*?) \| ([\d.]+) \|$", summary, re.MULTILINE))
    phases = [float(ms) for name, ms in rows.items() if name.startswith("112: ")]
    assert len(phases) == 11 and min(phases) > 0 and sum(phases[:-1]) == pytest.approx(phases[-1], abs=0.01)
    assert phases[-1] == pytest.approx(float(rows["step_avg"]), rel=0.5), "the phases fill a step"
    with tarfile.open(out / "prove.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    logs = sorted(path.name for path in (tmp_path / "prove").glob("*log.txt"))
    runs = ["checks-fp8-0-seed-0", "checks-fp8-1-seed-0", "demo", "memory-16", "memory-8", "shapes"]
    assert logs == [f"{run}-log.txt" for run in runs]
    assert report.read_log(tmp_path / "prove" / "shapes-log.txt").end.step == 6


def test_a_part_that_fails_or_finds_no_time_left_is_named_and_stops_no_other(tmp_path, capsys):
    proof = prove.Report(tmp_path / "out", tmp_path, minutes=0)

    def run(proof, name, program):
        proof.add(name, prove.finish(proof, prove.start(proof, name, ["-c", program])))

    proof.part("late", run, "import time; print('begun', flush=True); time.sleep(60)")
    proof.deadline += 60
    assert not proof.part("wrong", run, "raise SystemExit('the reason')")
    assert proof.part("right", run, "print('its figure')")
    late, wrong = proof.problems
    assert late.startswith("FAILED: late: TimeoutError: no time was left")
    assert wrong.startswith("FAILED: wrong: RuntimeError: exit code 1;") and "the reason" in wrong
    assert "## right\n\nits figure\n" in (tmp_path / "out/summary.md").read_text(encoding="utf-8")
    assert "the reason" in capsys.readouterr().out


def test_a_gpu_with_a_plain_kernel_is_not_measured_further(tmp_path, monkeypatch):
    lines = ["attention: WARNING: plain PyTorch, much slower; FlashAttention 2 of PyTorch was inf from it"]
    monkeypatch.setattr(train_gpt, "choose_kernels", lambda device, s: (train_gpt.Kernels(), lines))
    proof = prove.Report(tmp_path / "out", tmp_path, minutes=1)
    prove.prove(proof, ["kernels", "operations"], 1, True, 1, tmp_path)
    assert [*proof.sections] == ["kernels"] and "much slower" in proof.problems[0]


def test_the_cards_of_the_roofline_fit_and_the_faster_take_less_time(capsys):
    assert roofline.main(["--cards"]) == 0
    shown = capsys.readouterr().out
    cells = r"^\| (.+?), \d+ GB \| (\d+), \d+ \| (\d+) GiB \| (\d+) min \| ([\d.]+) min \|$"
    rows = re.findall(cells, shown, re.MULTILINE)
    assert [name for name, *_ in rows] == [gpu.name for gpu in roofline.GPUS]
    minutes = {name: int(alone) for name, _, _, alone, _ in rows}
    assert minutes["H100"] < minutes["A100"] < minutes["RTX 4090"] < minutes["RTX 3090"] < minutes["RTX 4070"]
    for gpu, (*_, memory, alone, shared) in zip(roofline.GPUS, rows):
        assert int(memory) < gpu.gigabytes and float(shared) < int(alone) < 9 * float(shared)


def test_settings_in_the_environment_apply_to_the_shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("WINDOW_SCHEDULE", "11")
    monkeypatch.setattr(prove, "run_shapes", lambda report, name, processes, settings: asked.update(settings))
    asked = {}
    prove.prove(prove.Report(tmp_path / "out", tmp_path, 1), ["shapes"], 1, True, 1, tmp_path)
    assert asked["WINDOW_SCHEDULE"] == "11" and asked["PRESET"] == "speedrun"


def counted(function):
    """TFLOP of the products in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def test_the_roofline_counts_the_products_of_blocks_head_and_optimizer_as_pytorch_does(small):
    s = replace(small, batch_tokens=(512,), microbatches=1)
    parts = roofline.step_parts(s, 1, document=40)
    found = {(part.phase, part.name): part.tflop for part in parts}
    model = fresh_model(s)
    model.kernels = train_gpt.Kernels(attn_args=lambda *_: None, attention=lambda q, k, v, *_: v)
    tokens, starts = torch.zeros(512, dtype=torch.int32), torch.tensor([0, 512], dtype=torch.int32)
    x = []
    assert counted(lambda: x.append(model.hidden(tokens, starts, 512, stage_of(s, 8, 4)))) == pytest.approx(
        found["blocks, forward", "products"])
    assert counted(lambda: x[0].sum().backward()) == pytest.approx(found["blocks, backward", "products"])
    head = x[0].detach().requires_grad_(), model.lm_head, tokens.long()
    loss = []
    assert counted(lambda: loss.append(train_gpt.softcapped_loss(*head))) == pytest.approx(
        found["head, forward", "logits"])
    assert counted(lambda: loss[0].backward()) == pytest.approx(found["head, backward", "products"])
    for name in ("attn_bank", "mlp_bank"):
        bank = getattr(model, name).detach()
        whole = roofline.newton_schulz_tflop(*bank.shape, symmetric=False)
        assert counted(lambda: train_gpt.newton_schulz(bank, torch.float32)) == pytest.approx(whole)
        assert found["Muon", name] == roofline.newton_schulz_tflop(*bank.shape) < whole


def test_the_roofline_counts_the_products_of_record_82s_blocks_as_pytorch_does(small):
    changes = train_gpt.PRESETS["frontier"] | dict(batch_tokens=(512,) * 4, microbatches=1)
    s = replace(small, **changes)
    model = fresh_model(s)
    plain = model.kernels
    model.kernels = plain._replace(attn_args=lambda *_: None, attention=lambda q, k, v, *_: v)
    stage = train_gpt.make_stages(s)[0]
    parts, _ = roofline.frontier_step_parts(s, stage, 1, 40, tied=True)
    found = {(part.phase, part.name): part.tflop for part in parts}
    tokens, starts = torch.zeros(512, dtype=torch.int32), torch.tensor([0, 512], dtype=torch.int32)
    x = []
    assert counted(lambda: x.append(model.hidden(tokens, starts, 512, stage))) == pytest.approx(
        found["blocks, forward", "products"], rel=1e-3)
    assert counted(lambda: x[0].sum().backward()) == pytest.approx(
        found["blocks, backward", "products"], rel=1e-3)


def test_the_roofline_sums_record_82_up_to_a_race(monkeypatch, capsys):
    """With collectives that take no time, what is left is the rest."""
    monkeypatch.setenv("PRESET", "frontier")
    assert roofline.main([]) == roofline.main(["--nvlink", "1e9"]) == 0
    found = re.findall(r"^estimate of the race, 1385 steps: ([\d.]+) s, ([\d.]+) s of it in collectives$",
                       capsys.readouterr().out, re.M)
    (whole, sending), (rest, none) = [[float(x) for x in line] for line in found]
    assert none == 0 < sending < whole == pytest.approx(rest + sending, abs=0.11)


@pytest.mark.parametrize("window, document", [(1, 1), (3, 10), (10, 10), (50, 10)])
def test_the_roofline_counts_the_keys_that_the_mask_shows(window, document):
    starts = torch.tensor([0], dtype=torch.int32)
    mask = train_gpt.banded_mask(starts, document, window, document, torch.float32)
    seen = (mask.flatten(0, 2)[:document] == 0).sum().item()
    assert roofline.visible_keys(window, document) == pytest.approx(seen / document)


def test_the_roofline_shows_measured_phases_beside_the_estimate(tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_text('step:1/2\nphases: {"384": {"blocks, forward": 21, "batch": 0.25}, '
                   '"896": {"batch": 0.25, "blocks, forward": 22}}\n')
    assert roofline.main(["--measured", str(log), "--bf16", "700"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("estimate, not measured: 8 ranks, 393,216 tokens a step; bf16 700,")
    assert " | 21.50 |\n" in shown and "| batch | - | 0.25 |\n" in shown and " | - |\n" in shown
    assert shown.endswith(" | 21.75 |\n")
