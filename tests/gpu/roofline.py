# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
What a step should cost on paper: FLOPs and bytes of each phase from the shapes in Settings, at given rates.

    python tests/gpu/roofline.py [--ranks 8] [--bf16 630 ...] [--measured shapes-log.txt]
    python tests/gpu/roofline.py --cards

Settings come from the environment, as for train_gpt.py; PRESET is speedrun unless it is set; frontier is
estimated stage by stage, with Adam's part on its own steps, and summed up to the whole race. A part takes as
long as its FLOPs or its bytes, whichever is longer; parts follow one another, and no collective overlaps with
computation. Launches, waiting and imbalance are not counted. --measured puts what phases.py
measured beside the estimate. None of this program's own numbers is a measurement.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402

RATES = dict(  # option -> (default, meaning); the defaults are assumptions for an H100 SXM, not measurements
    bf16=(630.0, "TFLOP/s in the blocks' products; 989 at the peak"),
    fp8=(1000.0, "TFLOP/s in the head's products, whose inner side is short; 1979 at the peak"),
    attention=(350.0, "TFLOP/s of FlashAttention 3 in short windows"),
    memory=(3.35, "TB/s of the GPU's memory; the peak"),
    nvlink=(350.0, "GB/s of a rank in a collective over NVLink; 450 at the peak"))

# What the blocks' pointwise kernels and reductions read and write: numbers of 2 bytes for each token, channel
# and block. graph_bytes.py counts them at the speedrun's shapes: 22.5 and 35.1 GB for 49,152 tokens.
POINTWISE = {"blocks, forward": 24.8, "blocks, backward": 38.7}
# Of record 82's network, counted likewise at 16,384 to 49,152 tokens: GB for 16,384 tokens, and GB for the
# banks of matrices, whatever the tokens.
FRONTIER_POINTWISE = {"blocks, forward": (8.5, 1.6), "blocks, backward": (13.85, 0.85)}
# NorMuon and cautious decay, which PyTorch computes operation by operation in float32: bytes for each number
NORMUON_BYTES = 100

class Gpu(NamedTuple):
    """A card, and peak rates by its maker's data sheet (dense; sums in float32)."""
    name: str
    gigabytes: int
    capability: tuple[int, int]
    bf16: float  # TFLOP/s
    fp8: float  # TFLOP/s; without units for float8 that of bfloat16
    memory: float  # TB/s
    link: float  # GB/s of a card in a collective of 8: an assumption
    attention: float  # the share of bf16 that attention reaches: an assumption

GPUS = [
    Gpu("H100", 80, (9, 0), 989, 1979, 3.35, 350, 0.35),
    Gpu("A100", 40, (8, 0), 312, 312, 1.56, 250, 0.5),
    Gpu("L40S", 48, (8, 9), 362, 733, 0.864, 10, 0.5),
    Gpu("RTX 4090", 24, (8, 9), 165, 330, 1.008, 10, 0.5),
    Gpu("RTX 3090", 24, (8, 6), 71, 71, 0.936, 10, 0.5),
    Gpu("RTX 4080", 16, (8, 9), 97, 195, 0.717, 10, 0.5),
    Gpu("RTX 4070", 12, (8, 9), 58, 117, 0.504, 10, 0.5),
]
REACHED = 0.64  # of the peak in products, as for the H100 above; in float8 half of it

class Part(NamedTuple):
    phase: str  # as phases.py names it
    name: str
    tflop: float  # on one rank, in one step
    gigabytes: float
    rate: str  # of the FLOPs; "nvlink": of the bytes

    def ms(self, rates: dict[str, float]) -> float:
        if self.rate == "nvlink":
            return 1000 * self.gigabytes / rates["nvlink"]
        return max(1000 * self.tflop / rates[self.rate], self.gigabytes / rates["memory"])

def visible_keys(window: int, document: int) -> float:
    """The mean number of keys that a query sees, in documents of this length."""
    most = min(window, document - 1)
    return 1 + most - most * (most + 1) / (2 * document)

def block_parts(model: train_gpt.GPT, s: train_gpt.Settings, tokens: int, document: int) -> list[Part]:
    """Of `tokens` tokens through the blocks, activations and products in bfloat16."""
    dim, blocks = s.model_dim, model.blocks
    num_attn, num_mlp = s.layout.count("A"), s.layout.count("M")
    weights = sum(math.prod(row.shape) for row in model.rows.values() if isinstance(row.rule, train_gpt.Muon))
    products = 2 * tokens * weights / 1e12
    operands = 2 * (tokens * (num_attn * 6 * dim + num_mlp * 2 * (dim + s.mlp_dim)) + weights) / 1e9
    stages = {step.stage for step in train_gpt.make_schedule(s)[:-1]}
    keys = 0.0  # of a query, over all attentions, in the mean of the stages
    for block in blocks:
        windows = [stage.long_window if block.long_window else stage.short_window for stage in stages]
        num_parts = sum(kind == "A" for parts in block.sublayers for kind, _ in parts)
        keys += num_parts * fmean(visible_keys(window, document) for window in windows)
    attention, moved = 4 * tokens * dim * keys / 1e12, 2 * tokens * 4 * dim * num_attn / 1e9
    parts = []
    for phase, times, flash in (("blocks, forward", 1, 1), ("blocks, backward", 2, 2.5)):
        pointwise = POINTWISE[phase] * 2 * tokens * dim * len(blocks) / 1e9
        parts += [Part(phase, "products", times * products, times * operands, "bf16"),
                  Part(phase, "attention", flash * attention, times * moved, "attention"),
                  Part(phase, "pointwise", 0, pointwise, "bf16")]
    return parts

def head_parts(s: train_gpt.Settings, tokens: int) -> list[Part]:
    """Of `tokens` tokens, in float8 with bfloat16 logits."""
    dim, vocab = s.model_dim, s.padded_vocab
    product = 2 * tokens * dim * vocab / 1e12
    logits, x, weight = (n / 1e9 for n in (tokens * vocab, tokens * dim, dim * vocab))
    return [Part("head, forward", "casts to float8", 0, (2 + 1 + 1) * x + (4 + 1 + 1) * weight, "fp8"),
            Part("head, forward", "logits", product, 2 * logits + x + weight, "fp8"),
            Part("head, forward", "loss", 0, 2 * logits, "fp8"),
            Part("head, backward", "gradient of the logits", 0, (2 + 1 + 1) * logits, "fp8"),
            Part("head, backward", "products", 2 * product, 2 * logits + 3 * x + 5 * weight, "fp8")]

def newton_schulz_tflop(count: int, rows: int, cols: int, symmetric: bool = True) -> float:
    """Of five steps; the symmetric kernel computes half of X X^T and of A A."""
    rows, cols = sorted((rows, cols))
    return count * 5 * ((rows**2 * cols + rows**3) * (1 if symmetric else 2) + 2 * rows**2 * cols) / 1e12

def optimizer_parts(model: train_gpt.GPT, ranks: int) -> list[Part]:
    parts, sent = [], 0
    for name, p in model.named_parameters():
        row = model.rows[name]
        share = 1 if row.tiny else ranks  # of the parameter that a rank updates
        count, sent = p.numel() / share, sent + p.nbytes * (ranks - 1) / ranks
        if isinstance(row.rule, train_gpt.Muon):
            # bytes: check, two lerps, norm and step; then those of the five steps
            matrices = len(p) // share
            rows, cols = sorted(p.shape[1:])
            moved = 50 * count + 5 * 2 * matrices * (4 * rows * cols + 5 * rows**2)
            parts.append(Part("Muon", name, newton_schulz_tflop(matrices, rows, cols), moved / 1e9, "bf16"))
        else:  # parameter and both moments read and written, the gradient read twice
            parts.append(Part("Adam", name, 0, 8 * p.element_size() * count / 1e9, "bf16"))
    return parts + [Part(phase, "all parameters", 0, sent / 1e9, "nvlink")
                    for phase in ("reduce-scatter", "all-gather")]

def step_parts(s: train_gpt.Settings, ranks: int, document: int) -> list[Part]:
    """All parts of a step on one of the ranks."""
    with torch.device("meta"):
        model = train_gpt.GPT(s, train_gpt.Kernels(), ranks)
    microbatches = s.num_microbatches(ranks)
    tokens, times = s.batch_tokens[0] // microbatches, microbatches // ranks
    parts = block_parts(model, s, tokens, document) + head_parts(s, tokens)
    return [p._replace(tflop=times * p.tflop, gigabytes=times * p.gigabytes) for p in parts] + \
        optimizer_parts(model, ranks)

def frontier_blocks(model: train_gpt.FrontierGPT, s: train_gpt.Settings, stage: train_gpt.Stage,
                    tokens: int, document: int) -> list[Part]:
    """Of `tokens` tokens through record 82's blocks, activations and products in bfloat16."""
    dim, kinds = s.model_dim, train_gpt.ATTENTIONS
    num_attn, num_mlp = len(kinds) - kinds.count("-"), len(kinds)
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if name.endswith(("bank", "gates", "gate")) or name in ("mudd_in", "mudd_out"))
    products = 2 * tokens * weights / 1e12
    operands = 2 * (tokens * (num_attn * 6 * dim + num_mlp * 2 * (dim + s.mlp_dim)) + weights) / 1e9
    document = min(document, stage.max_seq_len)
    keys = kinds.count("P") * visible_keys(stage.short_window, 2 * document)  # of half as many heads
    keys += kinds.count("S") * visible_keys(stage.short_window, document)
    keys += kinds.count("L") * visible_keys(stage.long_window, document)
    attention, moved = 4 * tokens * dim * keys / 1e12, 2 * tokens * 4 * dim * num_attn / 1e9
    parts = []
    for phase, times, flash in (("blocks, forward", 1, 1), ("blocks, backward", 2, 2.5)):
        by_token, fixed = FRONTIER_POINTWISE[phase]
        parts += [Part(phase, "products", times * products, times * operands, "bf16"),
                  Part(phase, "attention", flash * attention, times * moved, "attention"),
                  Part(phase, "pointwise", 0, by_token * tokens / 16_384 + fixed, "bf16")]
    dense = sum(p.nbytes for name, p in model.named_parameters() if "embed" in name) / 1e9
    rows = tokens * dim * (5 * 2 + 2 + 4) / 1e9  # of value embeddings, bigrams and the embedding
    parts.append(Part("blocks, backward", "gradients of tables, dense", 0, dense + 2 * rows, "bf16"))
    return parts

def frontier_step_parts(s: train_gpt.Settings, stage: train_gpt.Stage, ranks: int, document: int, tied: bool):
    """All parts of a step of a stage on one of the ranks, and those that Adam's own steps add."""
    with torch.device("meta"):
        model = train_gpt.FrontierGPT(s, train_gpt.Kernels(), ranks)
    microbatches = s.num_microbatches(ranks)
    tokens, times = stage.batch_tokens // microbatches, microbatches // ranks
    parts = frontier_blocks(model, s, stage, tokens, document) + head_parts(s, tokens)
    parts = [p._replace(tflop=times * p.tflop, gigabytes=times * p.gigabytes) for p in parts]
    adam, sent, sent_by_adam = [], 0, 0
    for part in optimizer_parts(model, ranks):
        if part.phase == "Muon":
            numbers = getattr(model, part.name).numel() / ranks
            parts.append(part._replace(gigabytes=part.gigabytes + NORMUON_BYTES * numbers / 1e9))
        elif part.phase == "Adam":
            adam.append(part)
    for name, p in model.named_parameters():
        size = p.nbytes * (ranks - 1) / ranks / 1e9
        if model.rows[name].rule.every == 1:
            sent += size
        else:
            sent_by_adam += size
    # of the gradients that a step adds to those of the step before, or to those of its other microbatches
    waiting = sum(p.nbytes for name, p in model.named_parameters() if model.rows[name].rule.every == 2) / 1e9
    adam.append(Part("Adam", "adding up gradients", 0, 3 * waiting, "bf16"))
    if times > 1:
        parts.append(Part("Adam", "adding up gradients", 0, 3 * (times - 1) * waiting, "bf16"))
    if tied:
        adam.append(Part("Adam", "tied: sum and copies", 0, 36 * model.lm_head.numel() / ranks / 1e9, "bf16"))
    for phase in ("reduce-scatter", "all-gather"):
        parts.append(Part(phase, "matrices", 0, sent, "nvlink"))
        adam.append(Part(phase, "all other parameters", 0, sent_by_adam, "nvlink"))
    return parts, adam

def estimate_frontier(s: train_gpt.Settings, ranks: int, document: int, rates: dict[str, float]) -> None:
    """Print a table of phases by stage, and the time of the race."""
    schedule = train_gpt.make_schedule(s)
    stages = train_gpt.stages_of(schedule[:-1])
    columns, seconds, sending = [], 0.0, 0.0
    for stage in stages:
        steps = [step for step in schedule[:-1] if step.stage is stage]
        parts, adam = frontier_step_parts(s, stage, ranks, document, steps[0].tied)
        ms, more = {}, {}
        for found, total in ((parts, ms), (adam, more)):
            for part in found:
                total[part.phase] = total.get(part.phase, 0) + part.ms(rates)
        columns.append((steps, ms, more))
        on_adam = sum(step.number % 2 for step in steps)
        seconds += (len(steps) * sum(ms.values()) + on_adam * sum(more.values())) / 1000
        for phase in ("reduce-scatter", "all-gather"):
            sending += (len(steps) * ms[phase] + on_adam * more[phase]) / 1000
        if stage is stages[-2]:
            print("\n| phase | part | TFLOP | GB | ms |\n| --- | --- | --- | --- | --- |")
            for part in parts + [part._replace(phase=f"{part.phase}, on Adam's steps") for part in adam]:
                figures = part.tflop, part.gigabytes, part.ms(rates)
                if part.ms(rates) > 0.01:
                    print("| " + " | ".join([part.phase, part.name, *(f"{x:.2f}" for x in figures)]) + " |")
    names = [f"steps {steps[0].number} to {steps[-1].number}" for steps, *_ in columns]
    print("\n| phase, ms | " + " | ".join(names) + " |\n" + "| --- " * (len(names) + 1) + "|")
    phases = dict.fromkeys(phase for _, ms, _ in columns for phase in ms)
    for phase in phases:
        print(f"| {phase} | " + " | ".join(f"{ms.get(phase, 0):.2f}" for _, ms, _ in columns) + " |")
    print("| sum | " + " | ".join(f"{sum(ms.values()):.2f}" for _, ms, _ in columns) + " |")
    print("| more on Adam's steps | " + " | ".join(f"{sum(x.values()):.2f}" for *_, x in columns) + " |")
    print(f"\nestimate of the race, {len(schedule) - 1} steps: {seconds:.1f} s, {sending:.1f} s of it in "
          "collectives")

def estimate_cards() -> None:
    """Print a table: what a run chooses on a card, and how long the speedrun takes there."""
    s = train_gpt.Settings()
    print("estimates, none measured\n")
    print("| GPU | `MICROBATCHES` on 1, on 8 | memory on 1 | the run on 1 | on 8 |")
    print("| --- | --- | --- | --- | --- |")
    for gpu in GPUS:
        card = train_gpt.Card(gpu.name, int(0.98 * gpu.gigabytes * 2**30), gpu.capability)
        fp8 = 0.5 * gpu.fp8 if gpu.fp8 > gpu.bf16 else REACHED * gpu.bf16
        rates = dict(bf16=REACHED * gpu.bf16, fp8=fp8, attention=gpu.attention * gpu.bf16, memory=gpu.memory,
                     nvlink=gpu.link)
        minutes = []
        fits = [train_gpt.fit_memory(s, [], ranks, [card]) for ranks in (1, 8)]
        for ranks, fitted in zip((1, 8), fits):
            step = sum(part.ms(rates) for part in step_parts(fitted.settings, ranks, 1000))
            minutes.append(step * s.num_iterations / 60_000)
        sizes = ", ".join(str(fitted.settings.microbatches) for fitted in fits)
        print(f"| {gpu.name}, {gpu.gigabytes} GB | {sizes} | {fits[0].peak / 2**30:.0f} GiB | "
              f"{minutes[0]:.0f} min | {minutes[1]:.1f} min |")

def read_phases(log: str) -> dict[str, float]:
    """phase -> ms in a step, the mean over the attention windows, in a log of phases.py."""
    windows = json.loads(re.search("^phases: (.*)$", log, re.MULTILINE)[1]).values()
    return {phase: fmean(window[phase] for window in windows) for phase in min(windows, key=len)}

def main(argv=None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ranks", type=int, default=8, help="GPUs that share a step (default: 8)")
    parser.add_argument("--document", type=int, default=1000, help="tokens of every document (default: 1000)")
    parser.add_argument("--measured", type=Path, help="log of phases.py, from as many GPUs")
    parser.add_argument("--cards", action="store_true",
                        help="a table of cards instead: microbatches, memory, time of the speedrun")
    for name, (default, meaning) in RATES.items():
        about = f"{meaning} (default: {default:g})"
        parser.add_argument(f"--{name}", type=float, default=default, help=about)
    args = parser.parse_args(argv)
    if args.cards:
        estimate_cards()
        return 0
    try:
        s, *_ = train_gpt.read_settings({"PRESET": "speedrun", **os.environ})
    except train_gpt.UserError as error:
        parser.error(str(error))
    if problem := train_gpt.world_size_problem(s, args.ranks):
        parser.error(problem)
    rates = {name: getattr(args, name) for name in RATES}
    if s.network == "frontier" and s.dtype == "bfloat16" and s.fp8_head and not args.measured:
        print(f"estimate, not measured: {args.ranks} ranks; "
              + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
              + "; the parts of the third stage that take 0.01 ms:")
        estimate_frontier(s, args.ranks, args.document, rates)
        return 0
    if s.network != "gpt" or s.dtype != "bfloat16" or not s.fp8_head or s.ngram_rows \
            or len(s.batch_tokens) > 1:
        parser.error("expected DTYPE=bfloat16, FP8_HEAD=1, NGRAM_ROWS=0 and one BATCH_TOKENS, or "
                     "PRESET=frontier without --measured; nothing else is estimated")
    totals, measured = {}, {}
    if args.measured:
        measured = read_phases(args.measured.read_text(encoding="utf-8"))
        measured["sum"] = sum(measured.values())
    print(f"estimate, not measured: {args.ranks} ranks, {s.batch_tokens[0]:,} tokens a step; "
          + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
    print("\n| phase | part | TFLOP | GB | ms |\n| --- | --- | --- | --- | --- |")
    for part in step_parts(s, args.ranks, args.document):
        totals[part.phase] = totals.get(part.phase, 0) + part.ms(rates)
        figures = part.tflop, part.gigabytes, part.ms(rates)
        print("| " + " | ".join([part.phase, part.name, *(f"{x:.2f}" for x in figures)]) + " |")
    phases = dict.fromkeys([*totals, *measured, "sum"])
    totals["sum"] = sum(totals.values())
    print("\n| phase | estimate, ms | measured, ms |\n| --- | --- | --- |")
    for phase in phases:
        figures = [f"{ms[phase]:.2f}" if phase in ms else "-" for ms in (totals, measured)]
        print(f"| {phase} | {figures[0]} | {figures[1]} |")
    return 0

if __name__ == "__main__":
    sys.exit(main())
