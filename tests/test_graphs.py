"""What torch.compile sees of the blocks at the speedrun's sizes, traced without values and without a GPU."""

import sys
from dataclasses import replace

import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt

sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import graph_bytes  # noqa: E402


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


def test_record_82s_blocks_are_one_graph_a_stage():
    """The loss weights and all else that moves within a stage are no part of the graph."""
    s = replace(train_gpt.Settings(), **train_gpt.PRESETS["frontier"])
    stages = train_gpt.make_stages(s)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graphs = graph_bytes.trace(train_gpt, mode, s, [*stages, *stages])
    torch.compiler.reset()
    assert len(graphs) == 2 * len(stages) == 10, "a forward and a backward graph for each stage"
