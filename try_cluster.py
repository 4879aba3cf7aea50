"""Correctness and time of cluster products."""
import sys, itertools, traceback
from dataclasses import replace
sys.path.insert(0, ".wt/cluster/benchmarks")
import torch
import tune_linear as T
from bench_kernels import micros
from vllm_model.kernels.cluster_linear import ClusterConfig as C
from vllm_model.kernels.linear import LinearConfig, Scaled, linear, linear_residual, linear_reference
from vllm_model.kernels.linear_table import choose_linear
torch.manual_seed(0)
def roomy(*shape):
    from vllm_model.kernels._launch import with_room
    out = with_room(torch.empty(0, device="cuda", dtype=torch.bfloat16), *shape)
    return out.copy_(torch.randn(*shape, device="cuda"))
init = T.Case.__init__
def new_init(self, name, rows, n, k, copies):
    init(self, name, rows, n, k, copies)
    self.x = roomy(rows, k); self.scaled = Scaled(self.x, self.scaled.squares)
T.Case.__init__ = new_init
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
for args in [(64, 256, 512, C(64, 32, 2, 2, 1), False, False, False), (64, 256, 512, C(64, 32, 1, 4, 2)), (64, 4096, 1024, C(64, 128, 1, 4, 4)), (50, 4096, 1024, C(64, 32, 2, 3, 1)), (100, 4096, 1024, C(64, 64, 4, 2, 2)), (100, 1000, 1088, C(128, 32, 2, 3, 4)),
             (64, 3072, 1024, C(64, 192, 2, 2, 4), True), (77, 3072, 1024, C(128, 48, 2, 3, 1), True), (64, 1024, 2048, C(64, 32, 2, 4, 4), False, True), (33, 1024, 3072, C(64, 32, 2, 2, 4), False, True), (128, 1024, 3072, C(128, 32, 2, 2, 4), False, True),
             (64, 4096, 12288, C(64, 32, 4, 3, 1), False, True), (64, 12288, 4096, C(64, 96, 2, 3, 2), True), (64, 1024, 2048, C(64, 64, 2, 2, 8), False, True), (3, 1024, 3072, C(64, 64, 2, 3, 8), False, True)]:
    try: print(args, f"{check(*args):.2e}", flush=True)
    except Exception as e: print(args, "FAILED", repr(e)[:200], flush=True); 
print("fp16", f"{check(64, 4096, 1024, C(64, 32, 2, 4, 4), dtype=torch.float16):.2e}")
mode = sys.argv[1]
combos = [(1, 4), (2, 2), (2, 3), (2, 4), (4, 2), (4, 3)]
def grid(bms, bns, combos, clusters): return [C(m, n, *cs, c) for m in bms for n in bns for cs in combos for c in clusters]
AHEADS = {"0.6B": (16,), "8B": (2,)}
cand = {
 "0.6B": {"qkv": grid((64, 128), (32, 64), combos, (1, 2)), "o": grid((64, 128), (32, 64), combos, (2, 4, 8)), "gate_up": grid((64, 128), (48, 64, 96), combos, (1, 2))},
 "8B": {"qkv": grid((64, 128), (48, 96), combos[1:], (1, 2)), "o": grid((64, 128), (32, 64), combos[1:], (1, 2)), "gate_up": grid((64, 128), (96, 192), combos[1:], (1, 2))}}
from vllm_model.kernels.cluster_linear import shared_bytes
from concurrent.futures import ThreadPoolExecutor
from vllm_model.kernels import cluster_linear as cl
import time
for model in cand:
    for name in cand[model]: cand[model][name] = [c for c in cand[model][name] if shared_bytes(c) <= 227 * 1024]
t0 = time.time()
todo = [cl.source(c, torch.bfloat16, name == "gate_up", name in ("qkv", "gate_up"), name == "o") for model in mode.split(",") for name, cs in cand[model].items() for c in cs]
with ThreadPoolExecutor(16) as pool: done = list(pool.map(cl.compiled, todo))
print("compiled", len(todo), "in", round(time.time() - t0, 1), flush=True)
known = {}
def spread(times):
    """The fastest of each cluster size."""
    seen = {}
    for u, c in times: seen.setdefault((c.cluster, c.block_n), (u, c))
    return " ".join(f"{u:.2f} {tuple(vars(c).values())}" for u, c in list(seen.values())[:6])
for model in mode.split(","):
    for rows in (64, 128, 32) if model == "0.6B" else (64,):
        best = {}
        for name, (n, k) in T.products(model).items():
            moved = n * k * 2 * (2 if name == "gate_up" else 1)
            case = T.Case(name, rows, n, k, max(2, min(24, int(1.6e8 / moved) + 1)))
            times = []
            tried = cand[model]["o" if name == "down" else name]
            if rows not in (64, 128): tried = [c for r in (64, 128) for c in known[name, r][:6]]
            for conf in dict.fromkeys(tried):
                if conf.block_m == 128 and rows <= 64: continue
                ctas = cl.n_tiles(conf, n, name == "gate_up") * conf.cluster * -(-rows // conf.block_m)
                if rows in (64, 128) and not 60 <= ctas <= 530: continue
                try: times.append((case.time(conf), conf))
                except Exception as e: print(name, rows, conf, repr(e)[:100])
            times.sort(key=lambda t: t[0])
            for _, conf in times[:4]:
                for ahead in AHEADS[model]:
                    try: times.append((case.time(replace(conf, ahead=ahead)), replace(conf, ahead=ahead)))
                    except Exception as e: print(name, rows, conf, repr(e)[:100])
            times.sort(key=lambda t: t[0]); best[name] = times[0][1]; known[name, rows] = [c for _, c in times]
            own = choose_linear(rows, n, k, name == "gate_up")
            print(f"{model} {name} {rows}: library {case.library():.2f} own {case.time(own) if own else 0:.2f} floor {moved / 4.24e6:.2f} | " + spread(times), flush=True)
        layers = T.Layers(model, rows)
        shapes = T.products(model)
        choices = [[None] + [c for c in (choose_linear(rows, *shapes[name], name == "gate_up"), best[name]) if c] for name in shapes]
        out = []
        for pick in itertools.product(*choices):
            choice = {shapes[name]: c for name, c in zip(shapes, pick) if c}
            out.append((layers.time(choice), "".join("L" if c is None else "C" if isinstance(c, C) else "O" for c in pick)))
        out.sort(); by = {t: u for u, t in out}
        print(f"LAYER {model} {rows}: LLLL {by['LLLL']:.1f} OOOO {by.get('OOOO', 0):.1f} CCCC {by['CCCC']:.1f} | " + "  ".join(f"{u:.1f} {t}" for u, t in out[:6]), flush=True)
