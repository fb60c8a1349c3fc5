#!/usr/bin/env python3
"""Times llama.cpp on a model that babygpt saved: a whole prompt at once, or one token after the other. tools/bench/bench.py calls it.

    python3 tools/bench/llama_decode.py M.safetensors --dtype f32|bf16|q8_0 --threads 2 [--what prefill|decode] [--seconds 3]
    python3 tools/bench/llama_decode.py M.safetensors --dtype f32 --threads 2 --score 5,17,3     the log-probability of each of these ids

Needs llama-cpp-python and gguf (tools/bench/peers.sh). The model is written once as GGUF, beside M. Only llama_decode is timed: llama.cpp
chooses no token, as its samplers would cost it more than they tell about the model. One JSON object.
"""
import argparse
import ctypes
import json
import math
import os
import statistics
import struct
import sys
import time

import gguf
import llama_cpp
import numpy as np

TYPES = {
    "f32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "bf16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
}
# Hugging Face's names of GPT-2's tensors, as babygpt saves them, and llama.cpp's. A layer's names are the same in each.
TENSORS = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
LAYER = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
         "mlp.c_proj": "ffn_down"}


def read_safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "F32", f"{name} is {info['dtype']}: the model must be in f32"
        begin, end = info["data_offsets"]
        tensors[name.removeprefix("transformer.")] = np.frombuffer(data[begin:end], dtype="<f4").reshape(info["shape"])
    return tensors


def write_gguf(source, path, dtype):
    tensors = read_safetensors(source)
    width = tensors["wte.weight"].shape[1]
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h."))
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(layers)
    writer.add_context_length(tensors["wpe.weight"].shape[0])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(tensors["h.0.mlp.c_fc.weight"].shape[1])
    writer.add_head_count(width // 64)  # the baby's heads
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(TYPES[dtype][0])
    writer.add_tokenizer_model("none")  # ids only
    writer.add_vocab_size(tensors["wte.weight"].shape[0])
    for name, values in tensors.items():
        if name == "lm_head.weight":
            continue  # tied: llama.cpp takes token_embd
        parts = name.split(".")
        stem, kind = ".".join(parts[2:-1] if parts[0] == "h" else parts[:-1]), parts[-1]
        new = f"blk.{parts[1]}.{LAYER[stem]}.{kind}" if parts[0] == "h" else f"{TENSORS[stem]}.{kind}"
        if values.ndim == 2 and parts[0] == "h":
            values = np.ascontiguousarray(values.T)  # GPT-2 keeps (in, out)
        kept = gguf.GGMLQuantizationType.F32 if values.ndim == 1 or stem == "wpe" else TYPES[dtype][1]
        writer.add_tensor(new, gguf.quants.quantize(values, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama_cpp.llama_log_callback
def silent(level, text, data):
    pass


class Llama:
    def __init__(self, path, threads):
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        how = llama_cpp.llama_context_default_params()
        self.length = llama_cpp.llama_model_n_ctx_train(self.model)
        how.n_ctx = how.n_batch = how.n_ubatch = self.length
        how.n_threads = how.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            sys.exit("llama.cpp cannot make a context")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(self.length, 0, 1)

    def reset(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def feed(self, ids, position=0, all_logits=False):
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position + i, 1, 0
            batch.logits[i] = all_logits or i + 1 == len(ids)
        if llama_cpp.llama_decode(self.context, batch) != 0:
            sys.exit("llama_decode failed")
        return llama_cpp.llama_get_logits_ith(self.context, len(ids) - 1)

    def score(self, ids):
        self.reset()
        self.feed(ids, all_logits=True)
        result = []
        for i, token in enumerate(ids[1:]):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), (self.vocab,)).astype(np.float64)
            result.append(float(logits[token] - logits.max() - math.log(np.exp(logits - logits.max()).sum())))
        return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=TYPES, default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", choices=["prefill", "decode"], default="decode")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--score")
    options = parser.parse_args()
    path = options.model.removesuffix(".safetensors") + f".{options.dtype}.gguf"
    if not os.path.exists(path) or os.path.getmtime(path) < os.path.getmtime(options.model):
        write_gguf(options.model, path + ".part", options.dtype)
        os.replace(path + ".part", path)
    llama = Llama(path, options.threads)
    if options.score:
        print(json.dumps({"logprobs": llama.score([int(i) for i in options.score.split(",")])}))
        return
    ids = [int(i) for i in np.random.default_rng(1).integers(0, llama.vocab, llama.length)]
    times, begin = [], None
    while begin is None or len(times) < 3 or time.perf_counter() - begin < options.seconds:
        llama.reset()
        start = time.perf_counter()
        if options.what == "prefill":
            llama.feed(ids)
        else:
            for i, token in enumerate(ids):
                llama.feed([token], i)
        if begin is None:
            begin = time.perf_counter()  # the first run does not count
        else:
            times.append(time.perf_counter() - start)
    print(json.dumps({"tokens_per_second": len(ids) / statistics.median(times), "dtype": options.dtype, "threads": options.threads,
                      "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
