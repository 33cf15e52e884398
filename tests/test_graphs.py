"""What torch.compile sees of the blocks at the speedrun's sizes, traced without values and without a GPU."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt

sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import graph_bytes  # noqa: E402


def kept_by_estimate(s, stage):
    """What estimate_memory counts of the blocks: what lives on after their forward pass."""
    card = train_gpt.Card("a card", 0, (9, 0))
    num_tokens = stage.batch_tokens // s.microbatches
    with torch.device("meta"), train_gpt.LiveBytes() as memory:
        model = train_gpt.NETWORKS[s.network](s, train_gpt.kernels_without_work(s, card))
        before = memory.live
        inputs, starts = (torch.empty(n, dtype=torch.int32) for n in (num_tokens, 256))
        x = model.hidden(inputs, starts, stage.max_seq_len, stage)
        assert x.shape == (num_tokens, s.model_dim)
        return memory.live - before


def test_the_speedruns_blocks_are_one_graph_a_window_and_keep_little_for_the_backward_pass():
    """Of each block 14 numbers a token and channel: MLP 4 and its square 4; inputs, q, k, v and so on."""
    s, mode = train_gpt.Settings(), FakeTensorMode(allow_non_fake_inputs=True)
    stages = train_gpt.make_stages(s)
    graphs = graph_bytes.trace(train_gpt, mode, s, [*stages, *stages])
    torch.compiler.reset()
    assert len(graphs) == 2 * len(stages) == 6, "a forward and a backward graph for each stage"
    kept = [graph_bytes.kept_bytes(graph) for graph in graphs[::2]]
    size = s.batch_tokens[0] // s.microbatches * s.model_dim * len(s.layout.split()) * s.torch_dtype.itemsize
    print(f"kept: {kept[0] / 1e9:.2f} GB, {kept[0] / size:.1f} numbers for each token, channel and block")
    assert max(kept) == min(kept) < 14.5 * size
    assert kept_by_estimate(s, stages[0]) == pytest.approx(kept[0], rel=0.02)


def test_record_82s_blocks_are_one_graph_a_stage():
    """The loss weights and all else that moves within a stage are no part of the graph."""
    s = replace(train_gpt.Settings(), **train_gpt.PRESETS["frontier"])
    stages = train_gpt.make_stages(s)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graphs = graph_bytes.trace(train_gpt, mode, s, [*stages, *stages])
    torch.compiler.reset()
    assert len(graphs) == 2 * len(stages) == 10, "a forward and a backward graph for each stage"
    for stage, graph in zip(stages, graphs[::2]):  # torch.compile computes some of it again
        assert 0.85 < graph_bytes.kept_bytes(graph) / kept_by_estimate(s, stage) <= 1
