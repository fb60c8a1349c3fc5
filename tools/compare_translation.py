#!/usr/bin/env python3
"""Trains the same encoder-decoder on the same pairs with PyTorch for as many seconds of the processor as `babygpt train` took, and compares
how well both translate (BLEU of sacrebleu, ATIS from English to Turkish). Takes a quarter of an hour; no part of make test-all.

    tools/compare_translation.py [--babygpt build/babygpt] [--shared ../shared] [--ours M.safetensors --seconds N] [--optimizer muon|adamw]

--ours with --seconds: a model that the command below has made before, and what that took. PyTorch begins with our first weights, reads the same
ids, batches of as many pairs, has torch.nn's layers, cross-entropy with label smoothing, Muon (that of tools/compare_torch.py; torch.optim.Muon
computes in bf16, which takes a second a step here) for the layers' matrices and AdamW for the rest, or AdamW for all, the same learning rates, and
keeps the weights that are best on the dev file. Its weights go into our checkpoint and are translated with, by the same program. Process time
of one thread, evaluations included, as for ours.
"""
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time

import compare_torch as mirror
import torch
import torch.nn.functional as F

try:
    import sacrebleu
except ImportError:
    print("skipped: sacrebleu is not here")
    sys.exit(0)

chosen = dict(zip(sys.argv[1::2], sys.argv[2::2]))
babygpt = chosen.get("--babygpt", "build/babygpt")
pairs = os.path.join(chosen.get("--shared", "../shared"), "data/parallel/ud_atis_en-tr.")
STEPS, BATCH, HEADS, DROPOUT, SMOOTHING, LR, MUON_LR = 1500, 32, 4, 0.1, 0.1, 2e-3, 0.02
COMMAND = (f"train {pairs}train.tsv --validation {pairs}dev.tsv --encoder-layers 2 --layers 2 --heads {HEADS} --width 128 --context 80 "
           f"--tokenizer bpe:2000 --optimizer muon --lr {LR} --batch {BATCH} --dropout {DROPOUT} --label-smoothing {SMOOTHING} --evaluate-every 100")


def train(out, *options):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([babygpt, *COMMAND.split(), "--out", out, "--json", *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def lines_of(part):
    with open(f"{pairs}{part}.tsv", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file]


def bleu(model, what):
    test = lines_of("test")
    for beams in (1, 4):
        said = subprocess.run([babygpt, "translate", model, "--beams", str(beams)], input="".join(s + "\n" for s, _ in test), check=True,
                              stdout=subprocess.PIPE, encoding="utf-8", errors="replace").stdout.split("\n")[:-1]  # bytes of a bad model
        print(f"{what}, {'greedy' if beams == 1 else f'{beams} beams'}: BLEU {sacrebleu.corpus_bleu(said, [[t for _, t in test]]).score:.2f}", flush=True)


def write(path, like, w):
    """The checkpoint `like`, with the numbers of `w`."""
    with open(like, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        body = bytearray(file.read())
    for name, info in json.loads(header).items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            body[begin:end] = w[name.removeprefix("transformer.")].contiguous().numpy().tobytes()
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little") + header + body)


def read_pairs(model, part):
    pairs = lines_of(part)
    text = "".join(json.dumps({"text": side}) + "\n" for pair in pairs for side in pair)
    ids = [json.loads(line)["ids"] for line in
           subprocess.run([babygpt, "encode", model, "--jsonl"], input=text, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()]
    return list(zip(ids[::2], ids[1::2]))


def tensors(batch, end):
    sources = mirror.padded([s + [end] for s, _ in batch], -1)
    return sources.clamp(min=0), sources < 0, mirror.padded([[end] + t for _, t in batch], 0), mirror.padded([t + [end] for _, t in batch], -1)


def train_with_torch(start, seconds, optimizer):
    """Returns the best weights."""
    w = mirror.read_safetensors(start)
    end = w["wte.weight"].shape[0] - 1
    training, held_out = read_pairs(start, "train"), read_pairs(start, "dev")
    assert max(max(map(len, pair)) for pair in training + held_out) < 80
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = mirror.Translator(w, HEADS, DROPOUT)
    matrices = [p for part in (model.encoder, model.decoder) for p in part.parameters() if p.dim() == 2] if optimizer == "muon" else []
    muon = mirror.Muon([(name, view) for name, view in model.views if ".h." in "." + name and view.dim() == 2]) if matrices else None
    adamw = mirror.adamw([p for p in model.parameters() if all(p is not m for m in matrices)])
    rng = random.Random(1)
    best, kept, step, done, order, next_look, losses = math.inf, None, 0, 0.0, [], 1 / 15, []
    begun = time.process_time()
    while done < 1:
        if len(order) < BATCH:
            order = order + rng.sample(range(len(training)), len(training))
        batch, order = order[:BATCH], order[BATCH:]
        done = min(1, (time.process_time() - begun) / seconds)
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))  # of the highest rate: half a cosine, to a tenth, as ours
        share = min((step + 1) / 100, share)
        for group in adamw.param_groups:
            group["lr"] = LR * share
        model.zero_grad()
        model.train()
        *read, targets = tensors([training[i] for i in batch], end)
        loss = F.cross_entropy(model(*read).flatten(0, 1), targets.flatten(), ignore_index=-1, label_smoothing=SMOOTHING)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), mirror.CLIP)
        adamw.step()
        if muon:
            model.see_gradients()
            muon.step(MUON_LR * share)
        losses.append(loss.item())
        step += 1
        if done < next_look:
            continue
        next_look = done + 1 / 15
        model.eval()
        with torch.no_grad():
            total = count = 0
            for i in range(0, len(held_out), BATCH):
                *read, targets = tensors(held_out[i:i + BATCH], end)
                total += F.cross_entropy(model(*read).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum").item()
                count += int((targets >= 0).sum())
        good = total / count < best
        if good:
            best, kept = total / count, {name: view.clone() for name, view in model.views}
        print(f"PyTorch, {optimizer}: {done * seconds:.0f} s, step {step}, loss {sum(losses) / len(losses):.4f}, dev {total / count:.4f}{' best' * good}",
              flush=True)
        losses = []
    print(f"PyTorch, {optimizer}: {step} steps in {time.process_time() - begun:.0f} s; best dev loss {best:.4f}")
    return kept


if not os.path.exists(pairs + "train.tsv"):
    print(f"skipped: {pairs}train.tsv is absent")
    sys.exit(0)
with tempfile.TemporaryDirectory() as folder:
    ours, start, theirs = chosen.get("--ours"), os.path.join(folder, "start.safetensors"), os.path.join(folder, "theirs.safetensors")
    seconds = float(chosen.get("--seconds", 0))
    if ours and seconds <= 0:
        sys.exit("--ours needs --seconds: what it took, which is what PyTorch gets")
    if not ours:
        ours = os.path.join(folder, "ours.safetensors")
        seconds = train(ours, "--steps", str(STEPS))
    print(f"ours: {STEPS} steps in {seconds:.0f} s of the processor", flush=True)
    bleu(ours, "ours")
    train(start, "--steps", "1", "--lr", "1e-12", "--muon-lr", "1e-12")
    for optimizer in [chosen["--optimizer"]] if "--optimizer" in chosen else ["muon", "adamw"]:
        write(theirs, start, train_with_torch(start, seconds, optimizer))
        bleu(theirs, f"PyTorch {torch.__version__}, {optimizer}")
