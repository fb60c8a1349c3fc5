#!/usr/bin/env python3
"""Trains the same two-layer GPT from the same weights on the same batches here and in PyTorch, and compares the loss of 100 AdamW steps.

    make build/tests/torch_steps && python3 tools/compare_torch.py build/tests/torch_steps

build/tests/torch_steps makes the weights, saves them as safetensors, and prints its losses and learning rates; this file reads the weights
and does the same steps. Two variants: GPT-2 as it is; and an untied head, no biases, erf-GELU.
"""
import json
import math
import os
import struct
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
except ImportError:
    if sys.executable != "/usr/bin/python3" and os.path.exists("/usr/bin/python3"):  # where Debian's python3-torch is
        os.execv("/usr/bin/python3", ["/usr/bin/python3"] + sys.argv)
    print("skipped: PyTorch is not here (Debian: apt install python3-torch)")
    sys.exit(0)

LIMIT = 1e-4
LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 2, 4, 64, 32, 8
WEIGHT_DECAY, BETAS, EPSILON, CLIP = 0.1, (0.9, 0.99), 1e-8, 1.0


def read_safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "F32", name
        begin, end = info["data_offsets"]
        values = np.frombuffer(data[begin:end], dtype="<f4").reshape(info["shape"])
        tensors[name.removeprefix("transformer.")] = torch.tensor(values.copy(), requires_grad=True)
    return tensors


def batches():
    random, token = 1, 0
    while True:
        ids = [token]
        for _ in range(BATCH * CONTEXT):
            random = (random * 1664525 + 1013904223) % 2**32
            token = (token * 5 + (random >> 30)) % 256
            ids.append(token)
        yield torch.tensor(ids[:-1]).view(BATCH, CONTEXT), torch.tensor(ids[1:]).view(BATCH, CONTEXT)


def loss_of(w, ids, targets, approximate):
    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[name + ".weight"], w.get(name + ".bias"), 1e-5)

    def linear(x, name):  # the matrix is (in, out), as in GPT-2's Conv1D
        y = x @ w[name + ".weight"]
        return y + w[name + ".bias"] if name + ".bias" in w else y

    x = w["wte.weight"][ids] + w["wpe.weight"]
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    for layer in range(LAYERS):
        h = f"h.{layer}."
        q, k, v = linear(norm(x, h + "ln_1"), h + "attn.c_attn").view(BATCH, CONTEXT, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.softmax(q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask, -1) @ v
        x = x + linear(y.transpose(1, 2).reshape(BATCH, CONTEXT, WIDTH), h + "attn.c_proj")
        y = F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate=approximate)
        x = x + linear(y, h + "mlp.c_proj")
    logits = norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten())


def compare(driver, variant):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        lines = subprocess.run([driver, path, str(variant)], check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")
        w = read_safetensors(path)
    ours = [tuple(map(float, line.split())) for line in lines if line]
    assert len(ours) == 100 and ("lm_head.weight" in w) == (variant == 1) and ("ln_f.bias" in w) == (variant == 0)
    groups = [{"params": [t for t in w.values() if t.dim() == 2], "weight_decay": WEIGHT_DECAY},
              {"params": [t for t in w.values() if t.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
    worst, where, first, last = 0.0, 0, 0.0, 0.0
    for step, ((our_loss, lr), (ids, targets)) in enumerate(zip(ours, batches())):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = loss_of(w, ids, targets, "none" if variant else "tanh")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), CLIP)
        optimizer.step()
        first, last = first or loss.item(), loss.item()
        if not abs(loss.item() - our_loss) <= worst:
            worst, where = abs(loss.item() - our_loss), step + 1
    print(f"variant {variant}: loss {first:.4f} to {last:.4f}; it differs from PyTorch {torch.__version__}'s by at most {worst:.2g} (step {where})")
    return worst <= LIMIT


torch.set_num_threads(2)
good = [compare(sys.argv[1] if len(sys.argv) > 1 else "build/tests/torch_steps", variant) for variant in (0, 1)]
print(f"{sum(good)} passed, {len(good) - sum(good)} failed")
sys.exit(0 if all(good) else 1)
