#!/usr/bin/env python3
"""Times PyTorch's training step of the model that `babygpt bench train` trains, with the best settings that we know. tools/bench/bench.py calls it.

    THP_MEM_ALLOC_ENABLE=1 python3 tools/bench/torch_train.py --vocab 96 --threads 2 [--dtype bf16] [--seconds 5]
    python3 tools/bench/torch_train.py --device cuda --batch 512 --dtype bf16

Compiled model, fused AdamW, fused attention, gradients set to None, no clipping (which ours does). The embedding's table is the head's.
On a GPU --graphs adds CUDA graphs (reduce-overhead), and f32 multiplies in TF32 with --dtype tf32.
One JSON object.
"""
import argparse
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocab, layers, heads, width, context):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocab", 96), ("layers", 6), ("width", 384), ("context", 192), ("batch", 8), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["f32", "tf32", "bf16"], default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--seconds", type=float, default=5)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(1)
    on_gpu = o.device == "cuda"
    if o.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    model = GPT(o.vocab, o.layers, o.width // 64, o.width, o.context).to(o.device)
    compiled = torch.compile(model, mode="reduce-overhead") if o.graphs else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    ids = torch.randint(o.vocab, (o.batch, o.context + 1)).to(o.device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    times, steps, begin = [], 0, 0.0
    warm = 5 if on_gpu else 2  # the first compiles, the second makes the optimizer's state known to the caches; graphs are captured after that
    while len(times) < 3 or time.perf_counter() - begin < o.seconds:
        start = time.perf_counter()
        if o.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(o.device, dtype=torch.bfloat16, enabled=o.dtype == "bf16"):
            loss = compiled(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        steps += 1
        if steps > warm:
            times.append(time.perf_counter() - start)
        else:
            begin = time.perf_counter()
    print(json.dumps({"tokens_per_second": o.batch * o.context / statistics.median(times), "dtype": o.dtype, "threads": o.threads,
                      "loss": loss.item(), "version": torch.__version__, "ms": 1e3 * statistics.median(times),
                      **({"gpu": torch.cuda.get_device_name(), "device_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {})}))


if __name__ == "__main__":
    main()
