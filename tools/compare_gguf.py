#!/usr/bin/env python3
"""GGUF in and out. Files that the package gguf writes are read, and ours are read by it: every number must be the same. Small models are trained
and given to llama.cpp (llama-cpp-python): it must cut texts into the same ids and say the same without chance; in Q8_0 its perplexity must be ours.
Where a file says that a token stands before each text, or says nothing of it, both must do the same.

    python3 tools/compare_gguf.py --babygpt build/babygpt
"""
import json
import math
import os
import subprocess
import sys
import tempfile

try:
    import gguf
    import numpy as np
except ImportError:
    print("skipped: gguf and numpy are not both here")
    sys.exit(0)

F32, F16, BF16, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0"))
LIMIT = 1e-3  # of log-probabilities: llama.cpp looks GELU up in a table of 16-bit numbers
babygpt = os.path.abspath(sys.argv[sys.argv.index("--babygpt") + 1] if "--babygpt" in sys.argv else "build/babygpt")
here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAYERS, WIDTH, HIDDEN, HEADS, KV, CONTEXT, VOCAB = 2, 64, 96, 4, 2, 32, 257  # heads of GPT-2 all have keys of their own
results = []


def check(good, what):
    results.append(good)
    print(f"{'ok' if good else 'FAILED'}: {what}", flush=True)


def run(*words, text=""):
    done = subprocess.run([babygpt, *map(str, words)], input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"babygpt {' '.join(map(str, words))}: {done.stderr.decode()}")
    return done.stdout.decode()


def tensors_of(path):
    """The tensors of a checkpoint in f32, without a package."""
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert all(entry["dtype"] == "F32" for name, entry in header.items() if name != "__metadata__")
    return {name: np.frombuffer(data[start + entry["data_offsets"][0]:start + entry["data_offsets"][1]], np.float32).reshape(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


def shapes(llama, tied, bias, vocab=VOCAB):
    """GGUF's name, ours, shape as a Linear has it, heads whose rows change places."""
    linear = [("attn_q", "self_attn.q_proj", WIDTH, WIDTH, HEADS), ("attn_k", "self_attn.k_proj", WIDTH // HEADS * KV, WIDTH, KV),
              ("attn_v", "self_attn.v_proj", WIDTH // HEADS * KV, WIDTH, 0), ("attn_output", "self_attn.o_proj", WIDTH, WIDTH, 0),
              ("ffn_gate", "mlp.gate_proj", HIDDEN, WIDTH, 0), ("ffn_up", "mlp.up_proj", HIDDEN, WIDTH, 0), ("ffn_down", "mlp.down_proj", WIDTH, HIDDEN, 0)
              ] if llama else [("attn_qkv", "attn.c_attn", 3 * WIDTH, WIDTH, 0), ("attn_output", "attn.c_proj", WIDTH, WIDTH, 0),
                               ("ffn_up", "mlp.c_fc", HIDDEN, WIDTH, 0), ("ffn_down", "mlp.c_proj", WIDTH, HIDDEN, 0)]
    norms = [("attn_norm", "input_layernorm" if llama else "ln_1"), ("ffn_norm", "post_attention_layernorm" if llama else "ln_2")]
    yield "token_embd.weight", "model.embed_tokens.weight" if llama else "wte.weight", (vocab, WIDTH), 0
    if not llama:
        yield "position_embd.weight", "wpe.weight", (CONTEXT, WIDTH), 0
    for i in range(LAYERS):
        theirs, ours = f"blk.{i}.", f"model.layers.{i}." if llama else f"h.{i}."
        for a, b, rows, cols, heads in linear:
            yield f"{theirs}{a}.weight", f"{ours}{b}.weight", (rows, cols), heads
            if bias:
                yield f"{theirs}{a}.bias", f"{ours}{b}.bias", (rows,), heads
        for a, b in norms:
            for kind in ("weight",) if llama else ("weight", "bias"):
                yield f"{theirs}{a}.{kind}", f"{ours}{b}.{kind}", (WIDTH,), 0
    for kind in ("weight",) if llama else ("weight", "bias"):
        yield f"output_norm.{kind}", f"{'model.norm' if llama else 'ln_f'}.{kind}", (WIDTH,), 0
    if not tied:
        yield "output.weight", "lm_head.weight", (vocab, WIDTH), 0


def permuted(values, heads):  # as llama.cpp's own converter does it
    return values if heads == 0 else values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def as_ours(name, values):
    return values.T if name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight")) else values


def add_bytes(writer):
    symbols = [chr(b if 33 <= b < 127 or 161 <= b < 173 or b > 173 else 256 + b if b < 33 else 289 + b - 127 if b < 161 else 323) for b in range(256)]
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(symbols + ["th"]), writer.add_token_types([1] * 257), writer.add_token_merges(["t h"])


def add_pieces(writer, pieces, kind, adds, begin):
    writer.add_tokenizer_model(kind), writer.add_token_list(pieces)
    writer.add_token_types([2, 3, 3] + [6 if piece.startswith("<0x") else 1 for piece in pieces[3:]])
    writer.add_token_scores([0.0 if piece.startswith("<") else -float(len(pieces) - i) for i, piece in enumerate(pieces)]), writer.add_eos_token_id(2)
    writer.add_add_eos_token(False), writer.add_add_space_prefix(True)  # what llama.cpp would do otherwise with a t5
    if adds is not None:
        writer.add_add_bos_token(adds)
    if begin is not None:
        writer.add_bos_token_id(begin)


def write_reference(path, llama, tied, bias, dtype, vocab=VOCAB, add_tokenizer=add_bytes, spread=0.1):
    """Writes a random model with the package gguf; returns what its numbers are, under our names and in our layout."""
    writer, wanted = gguf.GGUFWriter(path, "llama" if llama else "gpt2"), {}
    writer.add_context_length(CONTEXT), writer.add_embedding_length(WIDTH), writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN), writer.add_head_count(HEADS)
    if llama:
        writer.add_head_count_kv(KV), writer.add_layer_norm_rms_eps(3e-6), writer.add_rope_freq_base(25000.0), writer.add_rope_dimension_count(WIDTH // HEADS)
    else:
        writer.add_layer_norm_eps(2e-5)
    add_tokenizer(writer)
    for theirs, ours, shape, heads in shapes(llama, tied, bias, vocab):
        values = random.normal(0, spread, shape).astype(np.float32)
        kept = dtype if len(shape) > 1 else F32
        raw = gguf.quants.quantize(permuted(values, heads), kept)
        read = gguf.quants.dequantize(raw, kept).astype(np.float32)
        writer.add_tensor(theirs, raw, raw_dtype=kept)
        # undone by another route: row i of ours is where row i of arange went
        order = permuted(np.arange(shape[0]), heads)
        back = np.empty_like(read)
        back[order] = read
        wanted[ours] = as_ours(ours, back)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return wanted


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def compare_numbers(folder):
    for llama, tied, bias in ((True, False, False), (True, True, True), (False, True, True), (False, False, True)):
        for dtype in (F32, F16, BF16, Q8_0):
            theirs, ours, back = (os.path.join(folder, name) for name in ("theirs.gguf", "ours.safetensors", "back.gguf"))
            wanted = write_reference(theirs, llama, tied, bias, dtype)
            run("convert", theirs, ours, "--overwrite")
            good = same(wanted, tensors_of(ours)) and run("encode", theirs, text="the").split() == ["256", "101"]
            what = f"{'llama' if llama else 'gpt2'}, {'tied' if tied else 'untied'}{', biases' if llama and bias else ''}, {dtype.name}"
            check(good, f"{what}: read as gguf writes it")
        for dtype, kept in (("f32", F32), ("bf16", BF16), ("int8", Q8_0)):
            rounded = os.path.join(folder, "rounded.safetensors")
            run("convert", ours, rounded, "--dtype", dtype, "--overwrite")
            run("convert", rounded, back, "--overwrite")
            run("convert", rounded, rounded, "--dtype", "f32", "--overwrite")
            reader = gguf.GGUFReader(back)
            wanted, read = tensors_of(rounded), {}
            names = {a: (b, shape, heads) for a, b, shape, heads in shapes(llama, tied, bias)}
            for tensor in reader.tensors:
                name, shape, heads = names[tensor.name]
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
                assert tensor.tensor_type == (kept if len(shape) > 1 else F32), tensor.name
                undone = np.empty_like(values)
                undone[permuted(np.arange(shape[0]), heads)] = values
                read[name] = as_ours(name, undone)
            check(same(wanted, read), f"{'llama' if llama else 'gpt2'}, {'tied' if tied else 'untied'}, {kept.name}: written as gguf reads it")


TEXTS = ["Hello world, how are you?", " two  blanks\nand a line's end\n", "The cat's 12345 lives: don't!", "Merhaba d\u00fcnya, \u0131\u015f\u0131k", "caf\u00e9 \u20ac 5", "tabs\tand\r\n"]


def llama_says(llama, prompt, count, begins=True):
    """Without chance, from the text on: what stands before it is llama.cpp's own affair."""
    llama.reset(), llama.eval(llama.tokenize(prompt.encode(), add_bos=begins))
    said = []
    while len(said) < count:
        logits = llama.scores[llama.n_tokens - 1]
        logits[int(llama.metadata.get("tokenizer.ggml.unknown_token_id", 0))] = -np.inf  # which babygpt never says
        said.append(int(np.argmax(logits)))
        llama.eval(said[-1:])
    return said


def compare_beginnings(folder, llama_cpp):
    model, ours, back = (os.path.join(folder, name) for name in ("b.gguf", "b.safetensors", "back.gguf"))
    other, prompt = [], "the the het"
    for kind, adds, begin in (("llama", None, None), ("llama", True, 1), ("llama", True, 2), ("llama", None, 2), ("llama", False, 1), ("t5", True, 1),
                              ("t5", False, 1)):
        global random
        random = np.random.default_rng(7)  # the same weights each time
        pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256 if kind == "llama" else 0)]
        pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581t", "he", "\u2581the"]
        write_reference(model, True, True, False, F32, len(pieces), lambda writer: add_pieces(writer, pieces, kind, adds, begin), 0.4)
        run("convert", model, ours, "--overwrite"), run("convert", ours, back, "--overwrite")
        said = [json.loads(run("generate", path, "--json", "--prompt", prompt, "--temperature", "0", "--tokens", "12"))["ids"] for path in (model, ours, back)]
        theirs = [llama_cpp.Llama(path, n_ctx=CONTEXT, logits_all=True, verbose=False, type_k=0, type_v=0) for path in (model, back)]
        same = [llama_says(llama, prompt, len(said[0])) for llama in theirs] + said
        check(all(one == said[0] for one in same), f"{kind}, add_bos_token {adds}, bos_token_id {begin}: the same {len(said[0])} greedy tokens, there and back")
        check(theirs[0].tokenize(b"the") == theirs[1].tokenize(b"the"), "... and the same token before each text" if adds is not False else "... and none")
        other.append(str(said[0]))
    check(len(set(other[:5])) == 3 and len(set(other[5:])) == 2, "what stands before a text changes what is said")


def compare_llama_cpp(folder):
    try:
        import llama_cpp
    except ImportError:
        print("skipped: llama_cpp is not here; nothing was given to llama.cpp")
        return
    compare_beginnings(folder, llama_cpp)
    village = os.path.join(here, "examples", "village.txt")
    with open(village, encoding="utf-8") as file:
        text = file.read()
    pieces = os.path.join(here, "..", "shared", "data")
    models = [("gpt2", "bpe:512"), ("gpt2", "char"), ("llama", "byte"), ("llama", "wordpiece:500")]
    models += [("llama", path) for path in (pieces + "/tokenizers/sp_test_model.model", pieces + "/models/stories260K/tok512.bin") if os.path.exists(path)]
    for architecture, tokenizer in models:
        model, out, small = (os.path.join(folder, name) for name in ("m.safetensors", "m.gguf", "small.gguf"))
        run("train", village, "--out", model, "--overwrite", "--arch", architecture, "--tokenizer", tokenizer, "--steps", 120, "--layers", 2, "--heads", 4,
            "--width", 64, "--context", 256, "--batch", 2, "--lr", "5e-3", "--evaluate-every", 120, *(["--kv-heads", "2"] if architecture == "llama" else []))
        run("convert", model, out, "--overwrite")
        run("convert", model, small, "--dtype", "int8", "--overwrite")
        options = {"n_ctx": 256, "n_batch": 256, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
        full, eight = (llama_cpp.Llama(path, **options) for path in (out, small))
        name = f"{architecture}, {os.path.basename(tokenizer)}"

        lines = [line for line in text.splitlines() if line][:60] + (TEXTS if tokenizer != "char" else TEXTS[:1])
        other = [line for line in lines if list(map(int, run("encode", model, text=line).split())) != full.tokenize(line.encode(), add_bos=False)]
        check(not other, f"{name}: the ids of {len(lines)} texts" + (f", but for {other[0]!r}" if other else ""))

        prompt = "You: Hello"
        said = json.loads(run("generate", model, "--json", "--prompt", prompt, "--temperature", "0", "--tokens", "100"))["ids"]
        begins = not tokenizer.startswith("wordpiece")  # around that llama.cpp puts [CLS] and [SEP], whatever the file says
        begin = full.tokenize(b"", add_bos=begins)  # llama2.c's has one before each text
        check(begin == ([1] if tokenizer.endswith("tok512.bin") else []), f"{name}: {len(begin)} tokens before each text")
        check(said == llama_says(full, prompt, len(said), begins), f"{name}: the same {len(said)} greedy tokens")

        worst, ours, theirs = 0.0, [], []
        for at in range(0, 20000, 1000):
            scored = json.loads(run("score", model, "--json", text=text[at:at + 150]))
            for llama, losses in ((full, None), (eight, theirs)):
                read = begin + scored["ids"]
                llama.reset(), llama.eval(read)
                logits = np.array(llama.scores[:llama.n_tokens], np.float64)
                shifted = logits - logits.max(-1, keepdims=True)
                every = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
                probabilities = every[np.arange(len(logits) - 1), read[1:]]
                if losses is not None:
                    losses += list(-probabilities)
                else:
                    worst = max(worst, float(np.abs(probabilities - scored["logprobs"][1 - len(begin):]).max() / np.abs(scored["logprobs"]).max()))
            ours += [-x for x in scored["logprobs"][1 - len(begin):]]
        mean = [math.exp(sum(losses) / len(losses)) for losses in (ours, theirs)]
        check(worst <= LIMIT, f"{name}: relative error of log-probabilities {worst:.2g}")
        check(abs(mean[1] / mean[0] - 1) < 0.005, f"{name}: perplexity {mean[0]:.4f}, in Q8_0 by llama.cpp {mean[1]:.4f}")


random = np.random.default_rng(1)
with tempfile.TemporaryDirectory() as folder:
    compare_numbers(folder)
    compare_llama_cpp(folder)
print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
sys.exit(0 if all(results) else 1)
