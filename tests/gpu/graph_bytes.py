# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Count what the compiled blocks would read and write in an H100's memory. Needs no GPU.

    python3 -m venv VENV && VENV/bin/pip install torch==2.14.1 numpy huggingface_hub tqdm    # built for CUDA
    VENV/bin/python tests/gpu/graph_bytes.py [SCRIPT] [--kinds]

It is a count, not a time: the bytes that the kernels and products of the blocks (all but the head) read and
write for one microbatch, of the second stage of the speedrun; with PRESET=frontier, of each stage. Nothing
is computed: tensors have shapes and no values, the blocks are traced on the CPU as torch.compile traces them,
and Inductor plans the kernels of both graphs as if they were on the GPU. Of a buffer, such as a bank of
weights, our count takes what a kernel uses; Inductor's own takes all of it. What is kept is all that the
forward graph saves, without parameters and inputs.
"""

import argparse
import importlib.util
import math
import os
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import partition_fn
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import Layout
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20)


def trace(train_gpt, mode, s, stages):
    """The forward and backward graphs, cut where torch.compile cuts, for each of these stages. A graph break
    is an error."""
    graphs = []
    s = replace(s, val_slice_tokens=16)  # so that the rotary tables are no longer than a microbatch
    network = getattr(train_gpt, "NETWORKS", {}).get(getattr(s, "network", ""), train_gpt.GPT)

    def keep(gm, _):
        graphs.append(torch.fx.GraphModule(gm, deepcopy(gm.graph)))
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition_fn,
                           decompositions=select_decomp_table())
    kernels = train_gpt.Kernels(attn_args=train_gpt.varlen_args, attention=train_gpt.flash_attention)
    with mode:
        hidden = network(s, kernels).hidden
        hidden = torch.compile(hidden, backend=backend, fullgraph=True, dynamic=False)
        for stage in stages:
            num_tokens = stage.batch_tokens // s.microbatches
            inputs, cu_seqlens = (torch.empty(n, dtype=torch.int32) for n in (num_tokens, 256))
            hidden(inputs, cu_seqlens, stage.max_seq_len, stage).sum().backward()
    return graphs


def pretend_to_have_an_h100():
    """Let torch.cuda answer Inductor's questions without a driver."""
    answers = dict(is_available=True, device_count=1, current_device=0, get_device_capability=(9, 0),
                   get_device_properties=H100, _get_device_properties=H100, synchronize=None, _lazy_init=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    torch._inductor.scheduler.has_triton = lambda *args: True
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None  # PyTorch 2.11 would ask the driver


def bytes_moved(kernel):
    """What a kernel reads and writes in memory; of a buffer, only what it uses."""
    if isinstance(kernel, NopKernelSchedulerNode):
        return 0
    if isinstance(kernel, ExternKernelSchedulerNode):  # a product, attention or one of its results
        layouts = [getattr(x, "layout", None) for x in (*kernel.node.inputs, kernel.node)]
        return sum(math.prod(x.size) * x.dtype.itemsize for x in layouts if isinstance(x, Layout))
    own, elements = set(kernel.get_nodes()), Counter()
    for dep in kernel.read_writes.reads_and_writes():
        buffer = kernel.scheduler.name_to_buf.get(dep.name)
        if not (buffer and buffer.defining_op in own and {user.node for user in buffer.users} <= own):
            elements[dep.name] += dep.get_numel()
    buffers = {name: V.graph.get_buffer(name) for name in elements}
    return sum(min(elements[name], x.get_numel()) * x.get_dtype().itemsize for name, x in buffers.items())


class Kernel(NamedTuple):
    operations: str  # the names of the graph's operations that went into it
    moved: int  # [bytes]
    by_inductor: int  # [bytes] by Inductor's own count
    pointwise: bool  # no product or attention, but a kernel that Inductor writes


def plan_kernels(gm, mode):
    """The kernels that Inductor makes of a graph, as if on the GPU."""
    def on_gpu(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)

    with V.set_fake_mode(mode), torch.no_grad():
        with mode:
            for node in gm.graph.nodes:
                node.meta["val"] = tree_map_only(torch.Tensor, on_gpu, node.meta.get("val"))
                if "device" in node.kwargs:
                    node.kwargs = node.kwargs | dict(device=GPU)
        post_grad_passes(gm, is_inference=False)
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        lowering = GraphLowering(gm, example_inputs=inputs)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering._update_scheduler()
            kernels = [Kernel(operation_names(x), bytes_moved(x), x.get_read_write_buffers_sizes(),
                              not isinstance(x, ExternKernelSchedulerNode))
                       for x in lowering.scheduler.nodes]
            return [kernel for kernel in kernels if kernel.moved]  # the others run nothing


def operation_names(kernel):
    """The names of the graph's operations that went into a kernel."""
    origins = [origin for node in kernel.get_nodes() for origin in node.node.get_origins()]
    return ", ".join(sorted({str(x.target).split(".")[1] for x in origins if str(x.target).count(".")}))


def kept_bytes(gm):
    """Memory of what the forward graph hands on, parameters and inputs left out; views share theirs."""
    outputs = [node.meta["val"] for node in gm.graph.output_node().args[0] if node.op != "placeholder"]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in outputs}.values())


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    script = Path(__file__).resolve().parents[2] / "train_gpt.py"
    parser.add_argument("script", nargs="?", default=script, help="another train_gpt.py")
    parser.add_argument("--kinds", action="store_true", help="also the largest groups of kernels")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("train_gpt", args.script)
    sys.modules["train_gpt"] = train_gpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_gpt)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    preset = os.environ.get("PRESET", "speedrun")
    s = replace(train_gpt.Settings(), **train_gpt.PRESETS[preset])
    stages = train_gpt.make_stages(s)[1:2]
    if preset == "frontier":
        stages = train_gpt.make_stages(s)[:3]  # the others are as large as the third
    graphs = trace(train_gpt, mode, s, stages)
    kept = [kept_bytes(graph) for graph in graphs[::2]]
    pretend_to_have_an_h100()
    print("| graph | kernels and products | GB moved | of it pointwise | GB by Inductor's count | GB kept |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for number, gm in enumerate(graphs):
        name = ("forward", "backward")[number % 2]
        if len(stages) > 1:
            name += f", {stages[number // 2].batch_tokens // s.microbatches:,} tokens"
        kernels, kinds = plan_kernels(gm, mode), Counter()
        moved = sum(x.moved for x in kernels) / 1e9
        pointwise = sum(x.moved for x in kernels if x.pointwise) / 1e9
        by_inductor = sum(x.by_inductor for x in kernels) / 1e9
        print(f"| {name} | {len(kernels)} | {moved:.1f} | {pointwise:.1f} | {by_inductor:.1f} |",
              f"{kept[number // 2] / 1e9:.1f} |" if number % 2 == 0 else "|")
        for kernel in kernels:
            kinds[kernel.operations] += kernel.moved / 1e9
        for operations, size in kinds.most_common(20 * args.kinds):
            print(f"    {size:6.2f} GB: {operations}", flush=True)


if __name__ == "__main__":
    main()
