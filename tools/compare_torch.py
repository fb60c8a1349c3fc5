#!/usr/bin/env python3
"""Trains the same two-layer model from the same weights on the same batches here and in PyTorch, and compares the loss of 100 steps.

    make build/tests/torch_steps && python3 tools/compare_torch.py build/tests/torch_steps

build/tests/torch_steps makes the weights, saves them as safetensors, and prints its losses and learning rates; this file reads the weights
and does the same steps. The variants: GPT-2 as it is; an untied head, no biases, erf-GELU; rotary positions; Muon for the matrices; Llama's type
with grouped queries, by AdamW and by Muon; sinusoidal positions, ReLU and norms after the additions; encoder-decoders made of PyTorch's own
layers, as Vaswani et al. 2017 have them and with GPT-2's norms, positions and GELU (logits, then 50 steps);
so are encoders that say what each id is, or to which class all of them belong, by the mean or, with features as a Vision Transformer has
them, by the first row.
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

LIMIT, LOGITS_LIMIT = 1e-4, 1e-5
LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 2, 4, 64, 32, 8
LR, MUON_LR, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 3e-3, 0.02, 0.1, (0.9, 0.99), 1e-8, 1.0


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


def rotated(x):  # RoPE: pairs (i, i + half) of (batch, head, position, dim)
    half = x.shape[-1] // 2
    angle = torch.arange(CONTEXT)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def orthogonal(g):  # Newton-Schulz on the matrix itself
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Muon:
    def __init__(self, matrices):
        self.matrices = [(name, t, torch.zeros_like(t)) for name, t in matrices]

    @torch.no_grad()
    def step(self, lr):
        for name, w, momentum in self.matrices:
            momentum.lerp_(w.grad, 0.05)
            update = w.grad.lerp(momentum, 0.95)
            parts = update.chunk(update.shape[1] // update.shape[0] if "c_attn" in name else 1, 1)  # queries, keys, values
            w.mul_(1 - lr * WEIGHT_DECAY)
            in_, out = w.shape[1] if "model.layers." in name else w.shape[0], parts[0].shape[0 if "model.layers." in name else 1]
            w.sub_(torch.cat([orthogonal(p) * max(1, out / in_) ** 0.5 for p in parts], 1), alpha=lr)


def loss_of_llama(w, ids, targets):
    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w[name + ".weight"]

    def linear(x, name):
        return F.linear(x, w[name + ".weight"])

    def heads(x):
        return x.view(BATCH, CONTEXT, -1, WIDTH // HEADS).transpose(1, 2)

    x = w["model.embed_tokens.weight"][ids]
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    for layer in range(LAYERS):
        h = f"model.layers.{layer}."
        y = norm(x, h + "input_layernorm")
        q, k, v = (heads(linear(y, h + f"self_attn.{which}_proj")) for which in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        y = F.softmax(q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask, -1) @ v
        x = x + linear(y.transpose(1, 2).reshape(BATCH, CONTEXT, WIDTH), h + "self_attn.o_proj")
        y = norm(x, h + "post_attention_layernorm")
        x = x + linear(F.silu(linear(y, h + "mlp.gate_proj")) * linear(y, h + "mlp.up_proj"), h + "mlp.down_proj")
    logits = linear(norm(x, "model.norm"), "lm_head")
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten())


def waves(length=CONTEXT, width=WIDTH):
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).view(length, width)


def loss_of(w, ids, targets, variant):
    if variant in (4, 5):
        return loss_of_llama(w, ids, targets)
    after = variant == 6  # Vaswani et al. 2017

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[name + ".weight"], w.get(name + ".bias"), 1e-5)

    def linear(x, name):  # the matrix is (in, out), as in GPT-2's Conv1D
        y = x @ w[name + ".weight"]
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def activation(x):
        return F.relu(x) if after else F.gelu(x, approximate="none" if variant == 1 else "tanh")

    def sub_layer(x, name, f):
        return norm(x + f(x), name) if after else x + f(norm(x, name))

    x = w["wte.weight"][ids] + w.get("wpe.weight", 0) if not after else w["wte.weight"][ids] * WIDTH**0.5 + waves()
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    for layer in range(LAYERS):
        h = f"h.{layer}."

        def attention(x):
            q, k, v = linear(x, h + "attn.c_attn").view(BATCH, CONTEXT, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            if variant == 2:
                q, k = rotated(q), rotated(k)
            y = F.softmax(q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask, -1) @ v
            return linear(y.transpose(1, 2).reshape(BATCH, CONTEXT, WIDTH), h + "attn.c_proj")

        x = sub_layer(x, h + "ln_1", attention)
        x = sub_layer(x, h + "ln_2", lambda x: linear(activation(linear(x, h + "mlp.c_fc")), h + "mlp.c_proj"))
    logits = (x if after else norm(x, "ln_f")) @ w.get("lm_head.weight", w["wte.weight"]).T
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten())


class Mirror(torch.nn.Module):
    """A model of torch.nn's layers. `views` are its parameters under our names, each laid out as ours is."""

    def __init__(self):
        super().__init__()
        self.views, self.layouts = [], []

    def see(self, name, parameter, layout=lambda t: t):
        self.views.append((name, layout(parameter.detach())))
        self.layouts.append((parameter, layout))
        return parameter

    def parameter(self, w, name):
        return self.see(name, torch.nn.Parameter(w[name].detach().clone()))

    def linear(self, module, name):  # ours is (in, out), as in GPT-2's Conv1D
        self.see(name + ".weight", module.weight, lambda t: t.T)
        self.see(name + ".bias", module.bias)

    def norm(self, module, name):
        self.see(name + ".weight", module.weight)
        self.see(name + ".bias", module.bias)
        return module

    def layer(self, layer, h):
        self.see(h + "attn.c_attn.weight", layer.self_attn.in_proj_weight, lambda t: t.T)
        self.see(h + "attn.c_attn.bias", layer.self_attn.in_proj_bias)
        self.linear(layer.self_attn.out_proj, h + "attn.c_proj")
        self.linear(layer.linear1, h + "mlp.c_fc")
        self.linear(layer.linear2, h + "mlp.c_proj")
        self.norm(layer.norm1, h + "ln_1")
        self.norm(layer.norm3 if hasattr(layer, "norm3") else layer.norm2, h + "ln_2")
        if hasattr(layer, "norm3"):
            attention, width = layer.multihead_attn, layer.linear1.in_features
            for name, part in (("q_attn", slice(width)), ("c_attn", slice(width, None))):
                self.see(f"{h}crossattention.{name}.weight", attention.in_proj_weight, lambda t, part=part: t[part].T)
                self.see(f"{h}crossattention.{name}.bias", attention.in_proj_bias, lambda t, part=part: t[part])
            self.linear(attention.out_proj, h + "crossattention.c_proj")
            self.norm(layer.norm2, h + "ln_cross_attn")
        return layer

    def load(self, w):
        assert sum(p.numel() for p in self.parameters()) == sum(t.numel() for t in w.values())
        for name, view in self.views:
            view.copy_(w[name].detach())

    def see_gradients(self):
        for (_, view), (parameter, layout) in zip(self.views, self.layouts):
            view.grad = layout(parameter.grad)


class Translator(Mirror):
    """With "wpe.weight" in w: norms before the sub-layers, learned positions, GELU."""

    def __init__(self, w, heads=HEADS, dropout=0.0):
        super().__init__()
        self.first, self.width = "wpe.weight" in w, w["wte.weight"].shape[1]
        shape = dict(d_model=self.width, nhead=heads, dim_feedforward=4 * self.width, dropout=dropout, batch_first=True, norm_first=self.first,
                     activation=(lambda x: F.gelu(x, approximate="tanh")) if self.first else F.relu)
        self.dropout = torch.nn.Dropout(dropout)
        self.tokens = self.parameter(w, "wte.weight")
        if self.first:
            self.positions = torch.nn.ParameterList([self.parameter(w, name) for name in ("encoder.wpe.weight", "wpe.weight")])
            self.last = torch.nn.ModuleList([self.norm(torch.nn.LayerNorm(self.width), name) for name in ("encoder.ln_f", "ln_f")])
        layers = sum(name.endswith(".crossattention.c_proj.bias") for name in w)
        self.encoder = torch.nn.ModuleList([self.layer(torch.nn.TransformerEncoderLayer(**shape), f"encoder.h.{i}.") for i in range(layers)])
        self.decoder = torch.nn.ModuleList([self.layer(torch.nn.TransformerDecoderLayer(**shape), f"h.{i}.") for i in range(layers)])
        self.load(w)

    def embed(self, ids, which):
        x, length = self.tokens[ids], ids.shape[1]
        return self.dropout(x + self.positions[which][:length] if self.first else x * self.width**0.5 + waves(length, self.width))

    def forward(self, source, unused, ids):
        x = self.embed(source, 0)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=unused)
        x = self.last[0](x) if self.first else x
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
        y = self.embed(ids, 1)
        for layer in self.decoder:
            y = layer(y, x, tgt_mask=mask, memory_key_padding_mask=unused)
        return (self.last[1](y) if self.first else y) @ self.tokens.T


def padded(rows, with_what):
    return torch.tensor([row + [with_what] * (max(map(len, rows)) - len(row)) for row in rows])


def pairs():
    random = 1

    def below(limit):
        nonlocal random
        random = (random * 1664525 + 1013904223) % 2**32
        return (random >> 8) % limit

    while True:
        sources, said = [], []
        for _ in range(BATCH):
            source = [below(16) for _ in range(1 + below(CONTEXT))]
            sources.append(source)
            said.append([0] + [(source[i % len(source)] * 3 + 1) % 16 for i in range(1 + below(CONTEXT))])
        unused = padded(sources, -1) < 0
        yield padded(sources, 0), unused, padded([row[:-1] for row in said], 0), padded([row[1:] for row in said], -1)


def our_steps(driver, variant):
    """What build/tests/torch_steps prints, as numbers, and the weights that it begins with."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        lines = subprocess.run([driver, path, str(variant)], check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")
        return [tuple(map(float, line.split())) for line in lines if line], read_safetensors(path)


def apart(ours, theirs):
    theirs = theirs.detach()
    return float((torch.tensor(ours) - theirs).abs().max() / theirs.abs().max())


def adamw(tensors):
    groups = [{"params": [t for t in tensors if t.dim() == 2], "weight_decay": WEIGHT_DECAY},
              {"params": [t for t in tensors if t.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)


def follow(variant, steps, tensors, batches, loss_of_batch, muon=None, relative=False):
    """Takes our steps with our learning rates. Muon's matrices are not AdamW's."""
    of_muon = {id(t) for _, t, _ in muon.matrices} if muon else set()
    optimizer = adamw([t for t in tensors if id(t) not in of_muon])
    worst, where, first, last = 0.0, 0, 0.0, 0.0
    for step, ((our_loss, lr), batch) in enumerate(zip(steps, batches)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for t in tensors:
            t.grad = None
        loss = loss_of_batch(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors, CLIP)
        optimizer.step()
        if muon:
            muon.step(MUON_LR * lr / LR)
        first, last = first or loss.item(), loss.item()
        difference = abs(our_loss - loss.item()) / (loss.item() if relative else 1)
        if not difference <= worst:
            worst, where = difference, step + 1
    print(f"variant {variant}: loss {first:.4f} to {last:.4f}; from PyTorch {torch.__version__}'s it differs by at most {worst:.2g} (step {where})")
    return worst <= LIMIT


def compare_translators(driver, variant):
    (logits, *steps), w = our_steps(driver, variant)
    assert len(steps) == 50 and ("encoder.ln_f.weight" in w) == ("ln_f.weight" in w) == ("wpe.weight" in w) == (variant == 8)
    model = Translator(w)
    source, unused, ids, targets = next(pairs())
    difference = apart(logits, model(source, unused, ids)[0, int((targets[0] >= 0).sum()) - 1])
    print(f"variant {variant}: logits relative {difference:.2g}")

    def loss_of_batch(batch):
        *read, targets = batch
        return F.cross_entropy(model(*read).flatten(0, 1), targets.flatten(), ignore_index=-1)

    return follow(variant, steps, list(model.parameters()), pairs(), loss_of_batch) and difference <= LOGITS_LIMIT


class Reader(Mirror):
    """An encoder: for each id, or pooled for a class, with or without features."""

    def __init__(self, w, variant):
        super().__init__()
        self.variant = variant
        self.tokens, self.positions = self.parameter(w, "wte.weight"), self.parameter(w, "wpe.weight")
        self.features = self.parameter(w, "features.weight") if variant == 11 else None
        self.head = self.parameter(w, "score.weight") if variant > 9 else None
        self.bias = self.parameter(w, "score.bias" if variant > 9 else "lm_head.bias")
        self.last = self.norm(torch.nn.LayerNorm(WIDTH), "ln_f")
        self.layers = torch.nn.ModuleList([self.layer(torch.nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=True), f"h.{i}.")
            for i in range(LAYERS)])
        self.load(w)

    def forward(self, ids, features):  # one sequence: its logits, and its vector
        x = self.tokens[ids] + self.positions[:len(ids)]
        if self.features is not None:
            x = x + features @ self.features
        x = x[None]
        for layer in self.layers:
            x = layer(x)
        x = self.last(x)[0]
        vector = x[0] if self.variant == 11 else x.mean(0)
        return (x @ self.tokens.T if self.variant == 9 else vector @ self.head.T) + self.bias, vector


def sentences(variant):
    random = 1

    def below(limit):
        nonlocal random
        random = (random * 1664525 + 1013904223) % 2**32
        return (random >> 8) % limit

    while True:
        batch = []
        for _ in range(BATCH):
            length = 1 + below(CONTEXT)
            ids = [below(16) for _ in range(length)]
            targets = [-1 if i % 3 == 1 else ids[-1 - i] for i in range(length)] if variant == 9 else ids[0] % 5
            features = [[below(256) / 128 - 1 for _ in range(6)] for _ in range(length)] if variant == 11 else []
            batch.append((torch.tensor(ids), torch.tensor(targets), torch.tensor(features)))
        yield batch


def compare_readers(driver, variant):
    (probabilities, vector, *steps), w = our_steps(driver, variant)
    assert len(steps) == 50 and len(probabilities) == (16 if variant == 9 else 5) and len(vector) == WIDTH
    model = Reader(w, variant)
    ids, _, features = next(sentences(variant))[0]
    logits, their_vector = model(ids, features)
    difference = max(apart(probabilities, (logits[-1] if variant == 9 else logits).softmax(0)), apart(vector, their_vector))
    print(f"variant {variant}: probabilities and vector relative {difference:.2g}")

    def loss_of_batch(batch):
        said = [model(ids, features)[0] for ids, _, features in batch]
        logits = torch.cat([one if variant == 9 else one[None] for one in said])
        return F.cross_entropy(logits, torch.cat([targets.view(-1) for _, targets, _ in batch]), ignore_index=-1)

    return follow(variant, steps, list(model.parameters()), sentences(variant), loss_of_batch) and difference <= LOGITS_LIMIT


def compare(driver, variant):
    if variant >= 9:
        return compare_readers(driver, variant)
    if variant >= 7:
        return compare_translators(driver, variant)
    steps, w = our_steps(driver, variant)
    assert len(steps) == 100 and ("lm_head.weight" in w) == (variant in (1, 4, 5)) and ("ln_f.bias" in w) == (variant in (0, 2, 3))
    assert ("wpe.weight" in w) == (variant in (0, 1, 3))
    blocks = ("h.", "model.layers.")
    muon = Muon([(name, t) for name, t in w.items() if t.dim() == 2 and name.startswith(blocks)]) if variant in (3, 5) else None
    return follow(variant, steps, list(w.values()), batches(), lambda batch: loss_of(w, *batch, variant), muon, relative=variant == 6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    good = [compare(sys.argv[1] if len(sys.argv) > 1 else "build/tests/torch_steps", variant) for variant in range(12)]
    print(f"{sum(good)} passed, {len(good) - sum(good)} failed")
    sys.exit(0 if all(good) else 1)
