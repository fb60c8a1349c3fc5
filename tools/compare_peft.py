#!/usr/bin/env python3
"""LoRA adapters of Hugging Face's PEFT beside small random models of Llama and GPT-2 type: read here, beside the model and merged into it, and
written back for PEFT. All must give the log-probabilities that PEFT gives.

    python3 tools/compare_peft.py --babygpt build/babygpt
"""
import json
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging
except ImportError:
    print("skipped: PyTorch, transformers and PEFT are not all here")
    sys.exit(0)

LIMIT = 1e-5  # max |difference| / max |reference|
babygpt = sys.argv[sys.argv.index("--babygpt") + 1] if "--babygpt" in sys.argv else "build/babygpt"
TEXT = "".join(chr(32 + i * 7 % 90) for i in range(40))
GPT2 = (["c_attn"], ["attn.c_proj", "c_fc"], ["c_attn", "c_proj", "c_fc"])
LLAMA = (["q_proj", "v_proj"], ["k_proj", "o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def models():
    common = {"vocab_size": 256, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    yield LLAMA, lambda: LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                                                      max_position_embeddings=64, **common))
    yield GPT2, lambda: GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=64, n_inner=100, **common))


def ask(*words, text=""):
    lines = subprocess.run([babygpt, *words], input=text, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(lines) if "--json" in words else None


def score(*words):
    return torch.tensor(ask("score", *words, "--json", text=TEXT)["logprobs"][1:])


def logprobs(model):
    ids = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        return model.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]


def compare(make, targets, rank, alpha):
    with tempfile.TemporaryDirectory() as folder:
        base, ours, theirs, merged, alone, back = (os.path.join(folder, n) for n in ("base", "m.safetensors", "peft", "merged.safetensors", "a.safetensors", "back"))
        model = make()
        model.save_pretrained(base, safe_serialization=True)
        with open(os.path.join(base, "tokenizer.json"), "w") as file:
            file.write('{"babygpt":{"kind":"bytes"}}')
        plain = logprobs(model)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        wanted = logprobs(adapted)
        adapted.save_pretrained(theirs)
        ask("convert", base, ours)
        ask("convert", ours, "--merge", theirs, "--out", merged)
        ask("convert", ours, "--adapter", theirs, "--out", alone)
        ask("convert", ours, "--adapter", alone, "--out", back)
        again = logprobs(PeftModel.from_pretrained(type(model).from_pretrained(base, torch_dtype=torch.float32), back))
        found = {"PEFT's": score(ours, "--adapter", theirs), "as a file": score(ours, "--adapter", alone), "merged": score(merged), "read by PEFT again": again}
    errors = {name: ((x - wanted).abs().max() / wanted.abs().max()).item() for name, x in found.items()}
    moved = ((plain - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{type(model).__name__}, rank {rank}, alpha {alpha}, {','.join(targets)}: " + ", ".join(f"{name} {error:.2g}" for name, error in errors.items()) +
          f" (without it {moved:.2g})")
    return max(errors.values()) <= LIMIT < moved


torch.set_num_threads(1)  # small models
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
good = [compare(make, list(targets), rank, alpha) for all_targets, make in models() for targets in all_targets for rank, alpha in ((4, 8), (3, 5))]
print(f"{sum(good)} passed, {len(good) - sum(good)} failed")
sys.exit(0 if all(good) else 1)
