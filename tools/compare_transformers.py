#!/usr/bin/env python3
"""Small random models of Llama and GPT-2 type that transformers writes, in one file, in several, and in bf16: read here, written as a folder,
read by transformers again. Both ways the logits must be the same, and what both say without chance. Then beam search, by these and by a model that
has learnt a text: the same texts with the same scores. And folders whose tokenizers put a token before each text: from a prompt as text on, both say the
same, and what we write for transformers puts it there, too.

    python3 tools/compare_transformers.py --babygpt build/babygpt
"""
import json
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging
except ImportError:
    print("skipped: PyTorch and transformers are not both here")
    sys.exit(0)

try:
    import sentencepiece
    import tokenizers
except ImportError:
    sentencepiece = tokenizers = None

LIMIT = 1e-5  # max |difference| / max |reference|
babygpt = sys.argv[sys.argv.index("--babygpt") + 1] if "--babygpt" in sys.argv else "build/babygpt"
VOCAB = 256  # bytes: the model can be asked for the log-probabilities of a text
TEXT = "".join(chr(32 + i * 7 % 90) for i in range(40))


def models():
    common = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    for tied in (False, True):
        yield LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                                           max_position_embeddings=64, rope_theta=5e4, tie_word_embeddings=tied, **common))
    yield GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=64, n_inner=100, **common))


def ask(*words, text=""):
    lines = subprocess.run([babygpt, *words], input=text, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(lines) if "--json" in words else None


def compare(model, pieces, dtype):
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, back = (os.path.join(folder, name) for name in ("theirs", "ours.safetensors", "back"))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        model.to(dtype).save_pretrained(theirs, max_shard_size="60KB" if pieces else "5GB", safe_serialization=True)
        with open(os.path.join(theirs, "tokenizer.json"), "w") as file:
            file.write('{"babygpt":{"kind":"bytes"}}')
        ask("convert", theirs, ours)
        ask("convert", ours, back)
        # As floats: `to` would round the angles of the positions, too.
        model, again = (type(model).from_pretrained(path, torch_dtype=torch.float32).eval() for path in (theirs, back))
        ids = torch.tensor([list(TEXT.encode())])
        with torch.no_grad():
            wanted, exported = (m(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0] for m in (model, again))
            said = model.generate(ids[:, :8], do_sample=False, max_new_tokens=30, pad_token_id=0, eos_token_id=VOCAB)[0, 8:].tolist()
        scored = torch.tensor(ask("score", ours, "--json", text=TEXT)["logprobs"][1:])
        written = ask("generate", ours, "--json", "--prompt", TEXT[:8], "--temperature", "0", "--tokens", "30")["ids"]
    worst_in, worst_out = ((x - wanted).abs().max().item() / wanted.abs().max().item() for x in (scored, exported))
    good = worst_in <= LIMIT and worst_out <= LIMIT and written == said
    print(f"{type(model).__name__}, {'several files' if pieces else 'one file'}, {dtype}: relative error in {worst_in:.2g}, out {worst_out:.2g}, "
          f"{'the same' if written == said else 'OTHER'} greedy tokens")
    return good


# Width, how many are wanted, length penalty, early stopping. A text ends with one of some bytes, or after 24.
SEARCHES = ((1, 1, 1.0, False), (2, 2, 0.0, False), (3, 1, 1.0, "never"), (4, 1, 1.0, True), (4, 4, 1.0, False), (5, 5, -0.7, True), (8, 3, 2.0, "never"),
            (16, 9, 2.0, False))


def compare_searches(model, name, prompts, ends):
    """transformers' model and ours, saved from it, or the other way round"""
    different, worst, count = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = os.path.join(folder, "theirs"), os.path.join(folder, "ours.safetensors")
        if isinstance(model, str):
            os.mkdir(theirs)
            ours = model
            ask("convert", ours, theirs)
            model = GPT2LMHeadModel.from_pretrained(theirs, torch_dtype=torch.float32)
        else:
            model.float().save_pretrained(theirs, safe_serialization=True)
            with open(os.path.join(theirs, "tokenizer.json"), "w") as file:
                file.write('{"babygpt":{"kind":"bytes"}}')
            ask("convert", theirs, ours)
        model.eval()
        for beams, best, penalty, early in SEARCHES:
            for prompt in prompts:
                said = model.generate(torch.tensor([list(prompt.encode())]), do_sample=False, num_beams=beams, num_return_sequences=best, length_penalty=penalty,
                                      early_stopping=early, max_new_tokens=24, eos_token_id=[ord(c) for c in ends], pad_token_id=0, output_scores=True,
                                      return_dict_in_generate=True)
                words = ["--early-stopping", {False: "no", True: "yes"}.get(early, early), "--length-penalty", str(penalty), "--best", str(best)]
                found = ask("generate", ours, "--json", "--prompt=" + prompt, "--tokens", "24", "--beams", str(beams), *words, *("--stop=" + c for c in ends))["best"]
                wanted = [row[len(prompt):].tolist() for row in said.sequences]
                wanted = [row[:next((i + 1 for i, id in enumerate(row) if chr(id) in ends), len(row))] for row in wanted]
                different += [one["ids"] for one in found] != wanted
                if beams > 1:
                    worst = max([worst] + [abs(one["score"] / score.item() - 1) for one, score in zip(found, said.sequences_scores)])
                count += 1
    print(f"beam search, {name}: {count} searches, {different} with other texts, relative error of the scores {worst:.2g}")
    return different == 0 and worst <= LIMIT


def small_llama():
    return LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=400,
                                        max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2)).eval()


def compare_beginning(model, name, fill):
    """fill(folder) puts a tokenizer there. transformers reads all of it by itself, prompt and what stands before it."""
    prompt = "You: Hello, how are"
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, back = (os.path.join(folder, name) for name in ("theirs", "ours.safetensors", "back"))
        model.save_pretrained(theirs, safe_serialization=True)
        fill(theirs)
        begins = AutoTokenizer.from_pretrained(theirs)
        ask("convert", theirs, ours)
        ask("convert", ours, back)
        written = PreTrainedTokenizerFast(tokenizer_file=os.path.join(back, "tokenizer.json")) if name != "tokenizer.model" else begins
        ids = begins(prompt, return_tensors="pt").input_ids
        bare = len(begins(prompt, add_special_tokens=False).input_ids)
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0, eos_token_id=400,
                                suppress_tokens=[0] if name == "tokenizer.model" else None)[0, ids.shape[1]:].tolist()
        said = [ask("generate", path, "--json", "--prompt", prompt, "--temperature", "0", "--tokens", "30")["ids"] for path in (theirs, ours, back)]
    added = ids.shape[1] - bare
    good = all(one == wanted[:len(one)] and len(one) in (30, (wanted + [2]).index(2) + 1) for one in said) and written(prompt).input_ids == ids[0].tolist()
    print(f"{name}: {added} tokens before a text, {'the same' if good else 'OTHER'} ids and greedy tokens, there and back")
    return good, added, wanted


def compare_beginnings():
    with open("examples/village.txt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    results = []

    def byte_level(adds):
        def fill(folder):
            made = tokenizers.Tokenizer(tokenizers.models.BPE())
            made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
            made.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
                                                                           initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
            if adds:
                made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
            PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
        return fill

    def pieces(adds):
        def fill(folder):
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=os.path.join(folder, "tokenizer"), vocab_size=400, model_type="bpe",
                                                     byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
            with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
                json.dump({"tokenizer_class": "LlamaTokenizer", "add_bos_token": adds, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, file)
        return fill

    for name, tokenizer in (("byte-level BPE", byte_level), ("tokenizer.model", pieces)):
        found = [compare_beginning(small_llama(), name, tokenizer(adds)) for adds in (True, False)]
        results += [one[0] for one in found] + [[one[1] for one in found] == [1, 0] and found[0][2] != found[1][2]]
    return results


def trained(folder):
    path = os.path.join(folder, "trained.safetensors")
    subprocess.run([babygpt, "train", "examples/village.txt", "--out", path, "--tokenizer", "byte", "--layers", "2", "--heads", "2", "--width", "64", "--context", "64",
                    "--batch", "8", "--steps", "200", "--lr", "5e-3", "--validation-fraction", "0"], check=True, capture_output=True)
    return path


torch.set_num_threads(1)  # small models
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
good = [compare(model, pieces, dtype) for model in models() for pieces, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16))]
for model in models():
    texts = [TEXT[i:i + 5 + i] for i in (0, 7, 15)]
    good.append(compare_searches(model, "a random " + type(model).__name__, texts, "".join(chr(c) for c in range(40, 60))))
with tempfile.TemporaryDirectory() as folder:
    good.append(compare_searches(trained(folder), "a trained GPT2LMHeadModel", ["You: What", "Mira: The ", "You: hello\nMira:", "B"], "\n.?"))
if tokenizers:
    good += compare_beginnings()
else:
    print("skipped: tokenizers and sentencepiece are not both here; nothing was put before texts")
print(f"{sum(good)} passed, {len(good) - sum(good)} failed")
sys.exit(0 if all(good) else 1)
