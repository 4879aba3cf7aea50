"""Correctness and time of cluster products."""
import sys, itertools, traceback
sys.path.insert(0, ".wt/cluster/benchmarks")
import torch
import tune_linear as T
from bench_kernels import micros
from vllm_model.kernels.cluster_linear import ClusterConfig as C
from vllm_model.kernels.linear import LinearConfig, Scaled, linear, linear_residual, linear_reference
from vllm_model.kernels.linear_table import choose_linear
torch.manual_seed(0)
def err(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()
def check(rows, n, k, conf, silu=False, residual=False, scaled=True, dtype=torch.bfloat16):
    x = torch.randn(rows, k, device="cuda").to(dtype); w = (torch.randn(n * (2 if silu else 1), k, device="cuda") * k ** -0.5).to(dtype)
    torch.cuda.synchronize()
    if residual:
        r = torch.randn(rows, n, device="cuda").to(dtype); norm = torch.rand(n, device="cuda").to(dtype); want = r.double() + x.double() @ w.double().T
        torch.cuda.synchronize()
        got = linear_residual(x, w, r, norm, conf, pdl=True); torch.cuda.synchronize()
        return max(err(r, want), err(got.x, want * norm.double()), err(got.squares.sum(1), want.square().sum(1)))
    if scaled:
        h = x; norm = torch.rand(k, device="cuda").to(dtype); xs = (h.double() * norm.double()).to(dtype)
        sq = torch.stack([p.float().square().sum(1) for p in h.chunk(16, 1)], 1).contiguous()
        torch.cuda.synchronize()
        got = linear(Scaled(xs, sq), w, conf, silu=silu, pdl=True); torch.cuda.synchronize()
        xn = xs.double() * torch.rsqrt(h.double().square().mean(1, keepdim=True) + 1e-6)
        y = xn @ w.double().T
    else:
        got = linear(x, w, conf, silu=silu, pdl=True); torch.cuda.synchronize(); y = x.double() @ w.double().T
    if silu: g, u = y.chunk(2, 1); y = torch.nn.functional.silu(g) * u
    return err(got, y)
for args in [(64, 256, 512, C(64, 32, 4, 1), False, False, False), (64, 256, 512, C(64, 32, 4, 1)), (64, 4096, 1024, C(64, 32, 8, 4)), (50, 4096, 1024, C(64, 32, 4, 4)), (100, 4096, 1024, C(64, 32, 4, 2)), (100, 1000, 1064, C(128, 32, 5, 4)),
             (64, 3072, 1024, C(64, 48, 8, 4), True), (77, 3072, 1024, C(128, 48, 6, 4), True), (64, 1024, 2048, C(64, 32, 8, 4, True), False, True), (33, 1024, 3072, C(64, 32, 4, 4, True), False, True), (128, 1024, 3072, C(128, 32, 4, 4, True), False, True),
             (64, 4096, 12288, C(64, 32, 12, 4), False, True), (64, 12288, 4096, C(64, 192, 6, 2), True), (64, 1024, 2048, C(64, 64, 8, 8, True), False, True)]:
    try: print(args, f"{check(*args):.2e}", flush=True)
    except Exception as e: print(args, "FAILED", repr(e)[:200], flush=True); 
print("fp16", f"{check(64, 4096, 1024, C(64, 32, 8, 4), dtype=torch.float16):.2e}")
mode = sys.argv[1]
# each product
cand = {
 "0.6B": {"qkv": [C(m, bn, s, c) for m, bn, s, c in itertools.product((64, 128), (32, 64), (4, 6, 8, 16), (1, 2, 4))],
          "o": [C(m, bn, s, c, True) for m, bn, s, c in itertools.product((64, 128), (32, 64), (4, 8), (2, 4, 8))],
          "gate_up": [C(m, bn, s, c) for m, bn, s, c in itertools.product((64, 128), (48, 64, 96), (4, 6, 8, 12), (2, 4, 8))]},
 "8B": {"qkv": [C(m, bn, s, c) for m, bn, s, c in itertools.product((64, 128), (48, 96), (4, 6, 8, 12), (2, 4))],
        "o": [C(m, bn, s, c) for m, bn, s, c in itertools.product((64, 128), (32, 64), (6, 8, 12, 16), (2, 4))] + [C(m, bn, s, 2, True) for m, bn, s in itertools.product((64, 128), (64,), (6, 8))],
        "gate_up": [C(m, bn, s, c) for m, bn, s, c in itertools.product((64, 128), (96, 192), (4, 5, 6, 8), (2, 4))]}}
from vllm_model.kernels.cluster_linear import shared_bytes
from concurrent.futures import ThreadPoolExecutor
from vllm_model.kernels import cluster_linear as cl
import time
t0 = time.time()
todo = [cl.source(c, torch.bfloat16, name == "gate_up", name in ("qkv", "gate_up"), name == "o") for model in mode.split(",") for name, cs in cand[model].items() for c in cs if shared_bytes(c) <= 227 * 1024]
todo += [cl.source(c, torch.bfloat16, False, False, True) for c in ()]
with ThreadPoolExecutor(16) as pool: done = list(pool.map(cl.compiled, todo))
print("compiled", len(todo), "in", round(time.time() - t0, 1))
for model in mode.split(","):
    for rows in (16, 32, 64, 80, 96, 128, 256) if model == "0.6B" else (32, 64, 80, 96, 128):
        best = {}
        if model == "0.6B" and rows in (80, 96, 128):
            layers = T.Layers(model, rows); shapes = T.products(model)
            wide = {shapes["qkv"]: LinearConfig(64, 64, 128, 4, 3, 1, 4), shapes["gate_up"]: LinearConfig(64, 64, 64, 4, 4, 1, 4)}
            slim = {shapes["o"]: LinearConfig(64, 32, 128, 4, 4, 2, 4), shapes["down"]: LinearConfig(64, 32, 128, 4, 4, 2, 4)}
            slim1 = {s: LinearConfig(64, 32, 128, 4, 8, 1, 4) for s in slim}
            print(f"layer 0.6B {rows}: library {layers.time({}):.1f} all own wide {layers.time({**wide, **slim}):.1f} only o, down {layers.time(slim):.1f} o, down uncut {layers.time(slim1):.1f} wide, uncut {layers.time({**wide, **slim1}):.1f} qkv wide {layers.time({shapes['qkv']: wide[shapes['qkv']], **slim}):.1f}", flush=True)
        for name, (n, k) in T.products(model).items():
            moved = n * k * 2 * (2 if name == "gate_up" else 1)
            case = T.Case(name, rows, n, k, max(2, min(24, int(1.6e8 / moved) + 1)))
            times = []
            for conf in cand[model]["o" if name == "down" else name]:
                if shared_bytes(conf) > 227 * 1024 or (conf.block_m == 128 and rows <= 64): continue
                try: times.append((case.time(conf), conf))
                except Exception as e: print(name, rows, conf, repr(e)[:100])
            times.sort(key=lambda t: t[0]); best[name] = times[0][1]
            own = choose_linear(rows, n, k, name == "gate_up")
            print(f"{model} {name} {rows}: library {case.library():.2f} own {case.time(own) if own else 0:.2f} floor {moved / 4.24e6:.2f} | " + "  ".join(f"{u:.2f} {tuple(vars(c).values())}" for u, c in times[:5]), flush=True)
        layers = T.Layers(model, rows)
        shapes = T.products(model)
        now = {shapes[name]: c for name in shapes if (c := choose_linear(rows, *shapes[name], name == "gate_up"))}
        new = {shapes[name]: c for name, c in best.items()}
        print(f"LAYER {model} {rows}: library {layers.time({}):.1f} own {layers.time(now):.1f} cluster {layers.time(new):.1f} | one of them cluster, others as now:", "  ".join(f"{name} {layers.time({**now, shapes[name]: best[name]}):.1f}" for name in shapes), flush=True)
