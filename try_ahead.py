"""Layers with weights brought near by the kernel ahead."""
import sys
sys.path.insert(0, ".wt/cluster/benchmarks")
import torch
import tune_linear as T
from vllm_model.kernels import _launch as L
from vllm_model.kernels.linear_table import choose_linear
for model, rows_ in (("8B", (64, 128, 256)), ("0.6B", (256,))):
    for rows in rows_:
        layers = T.Layers(model, rows); shapes = T.products(model)
        now = {shapes[name]: c for name in shapes if (c := choose_linear(rows, *shapes[name], name == "gate_up"))}
        out = []
        for mb in (0, 2, 4, 8, 12, 16, 24, 0):
            L.AHEAD_BYTES = mb << 20
            out.append(f"{mb} MB: {layers.time({}):.1f} {layers.time(now):.1f}")
        print(f"ahead {model} {rows}: library, with ours |", "  ".join(out), flush=True)
