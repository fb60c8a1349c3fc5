#!/usr/bin/env python3
"""nanoGPT's character run on a CPU (4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps), by babygpt and, where PyTorch is, by PyTorch.

    python3 tools/bench/nanogpt.py TINYSHAKESPEARE [--babygpt build/babygpt] [--threads 2]

nanoGPT's README gives a loss of 1.88 for it, an estimate from 20 batches of random windows. Here both models are measured on all of the validation
text, cut into windows; of PyTorch's, such estimates are shown, too. Our seconds are those of the whole run with one evaluation and the n-gram
baseline, PyTorch's those of its steps, compiling left out; its GELU is the tanh form, ours erf's. The machine's ceiling says how many seconds
would do if it did nothing but multiply and add. A line each, and one JSON object.
"""
import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import subprocess
import tempfile
import time

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS, WARMUP = 4, 4, 128, 64, 12, 2000, 100


def ours(o):
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", o.text, "--out", f"{folder}/m.safetensors", "--tokenizer", "char", "--layers", LAYERS, "--heads", HEADS, "--width", WIDTH,
                 "--context", CONTEXT, "--batch", BATCH, "--steps", STEPS, "--lr", 1e-3, "--min-lr", 1e-4, "--warmup", WARMUP, "--beta2", 0.99,
                 "--weight-decay", 0.1, "--clip", 1, "--dropout", 0, "--no-bias", "--activation", "gelu", "--evaluate-every", STEPS,
                 "--threads", o.threads, "--json"]
        output = subprocess.run([o.babygpt, *map(str, words)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    return {"loss": lines[-1]["best_validation_loss"], "seconds": lines[-1]["seconds"]}


def pytorch(o):
    import torch
    from torch_train import GPT

    torch.set_num_threads(o.threads)
    torch.manual_seed(1)
    text = pathlib.Path(o.text).read_text(encoding="utf-8")
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[c] for c in text])
    train, validation = ids[:int(0.9 * len(ids))], ids[int(0.9 * len(ids)):]
    model = GPT(len(index), LAYERS, HEADS, WIDTH, CONTEXT)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    for name, parameter in model.named_parameters():
        if name.endswith((".out.weight", ".down.weight")):
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS))
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    compiled = torch.compile(model)

    def windows(of, starts):
        return torch.stack([of[s:s + CONTEXT] for s in starts]), torch.stack([of[s + 1:s + CONTEXT + 1] for s in starts])

    def random_windows(of):
        return windows(of, torch.randint(len(of) - CONTEXT, (BATCH,)).tolist())

    start = 0.0
    for step in range(STEPS):
        if step == 2:  # the first ones compile
            start = time.perf_counter()
        share = min(1.0, (step - WARMUP) / (STEPS - WARMUP))
        rate = 1e-3 * (step + 1) / (WARMUP + 1) if step < WARMUP else 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compiled(*random_windows(train))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = (time.perf_counter() - start) * STEPS / (STEPS - 2)
    with torch.no_grad():
        starts = list(range(0, len(validation) - CONTEXT, CONTEXT))
        whole = [(model(*windows(validation, starts[i:i + 64])).item(), len(starts[i:i + 64])) for i in range(0, len(starts), 64)]
        estimates = sorted(statistics.mean(model(*random_windows(validation)).item() for _ in range(20)) for _ in range(50))
    return {"loss": sum(a * n for a, n in whole) / len(starts), "seconds": seconds, "estimates": [estimates[0], estimates[25], estimates[-1]]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--babygpt", default="build/babygpt")
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    result = {"babygpt": ours(o)}
    print(f"babygpt  {result['babygpt']['loss']:.3f}  {result['babygpt']['seconds']:6.1f} s", flush=True)
    if importlib.util.find_spec("torch"):
        result["PyTorch"] = pytorch(o)
        print("PyTorch  {loss:.3f}  {seconds:6.1f} s; estimates from 20 batches: {estimates[0]:.3f} to {estimates[2]:.3f}".format(**result["PyTorch"]))
    else:
        print("PyTorch  is not here")
    flops = 3 * (LAYERS * (24 * WIDTH * WIDTH + 2 * WIDTH * (CONTEXT + 1)) + 2 * WIDTH * 65) * STEPS * BATCH * CONTEXT
    words = [o.babygpt, "bench", "train", "--preset", "nano", "--seconds", "0.1", "--threads", str(o.threads), "--json"]
    ceiling = max(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)["ceiling_gflops"] for _ in range(5))
    result["seconds_at_the_ceiling"] = flops / ceiling / 1e9
    print(json.dumps(result))


if __name__ == "__main__":
    main()
