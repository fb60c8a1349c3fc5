#!/usr/bin/env python3
"""Compares the ids of `babygpt encode` with those of tiktoken, Hugging Face's tokenizers and sentencepiece, where they are installed.

    tools/compare_tokenizers.py [--babygpt build/babygpt] [--shared ../shared] [--strings 200000] [--seed 1]

Takes the text files under the shared folder whole and line by line, DialogSum's fields, the Turkish text, and random strings: of all
code points, of those at which classes change, of pieces that the pre-tokenization cuts in special ways, long runs. Also trains WordPiece
and unigram models here and there on the same texts: ours has at most 2 % more tokens per character (line by line, as sentencepiece reads a
text) and takes at most twice the time, and the other library gives the same ids with our file. Ends with a line `N passed, N failed, N skipped`. What is missing is skipped with a line that says so.
"""
import argparse
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import unicodedata

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
passed = failed = skipped = 0


def result(name, good, detail=""):
    global passed, failed
    passed, failed = passed + good, failed + (not good)
    print(("same      " if good else "DIFFERENT ") + name + (": " + detail if detail else ""), flush=True)


def skip(name, why):
    global skipped
    skipped += 1
    print(f"skipped   {name}: {why}", flush=True)


def encode(program, tokenizer, texts, special=False):
    """The ids of each text, from one run of the program."""
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    command = [program, "encode", tokenizer, "--jsonl"] + (["--special"] if special else [])
    run = subprocess.run(command, input=lines.encode(), stdout=subprocess.PIPE, check=True)
    found = [json.loads(line)["ids"] for line in run.stdout.splitlines()]
    if len(found) != len(texts):
        raise SystemExit(f"{len(texts)} lines were asked for, {len(found)} came back")
    return found


def compare(name, texts, got, wanted):
    wrong = [i for i in range(len(texts)) if list(wanted[i]) != got[i]]
    detail = f"{len(texts)} texts, {sum(map(len, got))} ids"
    if wrong:
        i = wrong[0]
        at = next((k for k, (a, b) in enumerate(zip(wanted[i], got[i])) if a != b), min(len(wanted[i]), len(got[i])))
        detail = f"{len(wrong)} of {len(texts)}; first: {texts[i][:80]!r}, id {at}: {list(wanted[i][at:at + 4])} expected, {got[i][at:at + 4]} found"
    result(name, not wrong, detail)


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def random_strings(count, rng):
    kinds = {}
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            kinds.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    names = sorted(kinds)
    blanks = " \t\n\r\x0b\x0c\x85\u00a0\u1680\u2000\u2007\u2009\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\x1c\x1f"
    pieces = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", "''", "'l", "'r", "'v", " '", "’s", " ", "  ", "\n\n", " \n", "\t", "the", " The", "don't", "123",
              "x²", "½", "e\u0301", "<|endoftext|>", "...", "!!", "日本語", " türkçe", "İ", "ß", "😀", "👩‍👩‍👧", "\u200d", "\ufffd", "\x00", "\U0010ffff"]

    def one():
        kind = rng.randrange(6)
        size = rng.randrange(1, 24)
        if kind == 0:  # any code point
            return "".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(size)) if not 0xD800 <= c < 0xE000)
        if kind == 1:  # any category, each as often
            return "".join(rng.choice(kinds[rng.choice(names)]) for _ in range(size))
        if kind == 2:
            return "".join(chr(rng.randrange(128)) for _ in range(size * 3))
        if kind == 3:
            return "".join(rng.choice(pieces) for _ in range(size))
        if kind == 4:
            return "".join(rng.choice(blanks) if rng.random() < 0.5 else rng.choice("ab1'!é½") for _ in range(size))
        return (rng.choice(pieces) + rng.choice("aA0 \n^'é")) * rng.randrange(1, 60)

    return [one() for _ in range(count)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--babygpt", default="build/babygpt")
    parser.add_argument("--shared", default="../shared")
    parser.add_argument("--strings", type=int, default=200000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    data = os.path.join(options.shared, "data")
    gpt2 = os.path.join(data, "tokenizers", "gpt2")
    ranks_file = os.path.join(gpt2, "r50k_base.tiktoken")
    if not os.path.exists(options.babygpt):
        skip("everything", f"there is no {options.babygpt}")
    elif not os.path.exists(ranks_file):
        skip("everything", f"there is no {ranks_file}")
    else:
        against_tiktoken(options, data, gpt2, ranks_file)
        against_hugging_face(options, data)
        against_bert_and_sentencepiece(options, data)
        train_wordpiece(options, data)
        train_unigram(options, data)
        unigram_files(options, data)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def against_tiktoken(options, data, gpt2, ranks_file):
    try:
        import tiktoken
    except ImportError:
        return skip("tiktoken", "not installed")
    with open(ranks_file, "rb") as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file.read().splitlines() if line)}
    reference = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})

    def check(name, texts, tokenizer=gpt2):
        compare(f"tiktoken, {name}", texts, encode(options.babygpt, tokenizer, texts), [reference.encode_ordinary(t) for t in texts])

    files = {}
    for folder in ("text", "turkish", "parallel"):
        path = os.path.join(data, folder)
        if not os.path.isdir(path):
            skip(folder, "the folder is absent")
            continue
        for name in sorted(os.listdir(path)):
            files[name] = read(os.path.join(path, name))
            check(name + ", whole", [files[name]])
            check(name + ", by lines", files[name].split("\n"))
    for name in ("train", "dev", "test"):
        path = os.path.join(data, "dialogsum", f"dialogsum.{name}.jsonl")
        if not os.path.exists(path):
            skip(f"dialogsum {name}", "the file is absent")
            continue
        records = [json.loads(line) for line in read(path).split("\n") if line]
        check(f"dialogsum {name}", [text for record in records for text in record.values() if isinstance(text, str)])
    strings = random_strings(options.strings, random.Random(options.seed))
    check(f"random strings, seed {options.seed}", strings)
    check("random strings, .tiktoken file", strings[:20000], ranks_file)
    compare("tiktoken, special tokens", strings[:20000], encode(options.babygpt, gpt2, strings[:20000], special=True),
            [reference.encode(t, allowed_special="all") for t in strings[:20000]])
    if "tinystories_sample_2MiB.txt" in files:
        fast = lambda ours, theirs: ours > theirs and ours > 20e6
        ours, theirs = speed(options, gpt2, reference.encode_ordinary, files["tinystories_sample_2MiB.txt"], fast)
        result("faster than tiktoken, and 20 MB/s", fast(ours, theirs),
               f"{ours / 1e6:.1f} MB/s with reading and printing, tiktoken {theirs / 1e6:.1f} MB/s")


def speed(options, tokenizer, reference, text, fast):
    """Bytes a second of one thread each; the program's own start and its reading of the vocabulary are taken off by a run on nothing."""
    text = text * 8
    data = text.encode()
    run = lambda given: subprocess.run([options.babygpt, "encode", tokenizer], input=given, stdout=subprocess.DEVNULL, check=True)
    nothing = min(in_turns(lambda: run(b""), lambda: None, lambda *_: True)[0] for _ in range(3))
    rates = lambda ours, theirs: (len(data) / (ours - nothing), len(data) / theirs)
    return rates(*in_turns(lambda: run(data), lambda: reference(text), lambda *seconds: fast(*rates(*seconds))))


def against_hugging_face(options, data):
    """Trains a tokenizer, and has Hugging Face's library read our tokenizer.json."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return skip("Hugging Face's tokenizers", "not installed")
    path = os.path.join(data, "text", "tinyshakespeare.txt")
    if not os.path.exists(path):
        return skip("Hugging Face's tokenizers", f"there is no {path}")
    with tempfile.TemporaryDirectory() as folder:
        ours = os.path.join(folder, "tokenizer.json")
        subprocess.run([options.babygpt, "tokenizer", path, "--vocab", "1024", "--overwrite", "--out", ours], stdout=subprocess.DEVNULL, check=True)
        reference = Tokenizer.from_file(ours)
        # Its regular expressions know another version of Unicode, so characters that are newer than this one are left out.
        known = [t for t in random_strings(20000, random.Random(options.seed + 1)) if all(unicodedata.category(c) != "Cn" for c in t)]
        texts = read(path).split("\n") + known
        wanted = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
        compare("Hugging Face's tokenizers, our own tokenizer.json", texts, encode(options.babygpt, ours, texts, special=True), wanted)


def against_bert_and_sentencepiece(options, data):
    """50,000 lines of English, Turkish, dialogue and random Unicode."""
    texts = []
    for name in ("text/botchan.txt", "turkish/turkish_all_cc-by-sa.txt", "text/tinyshakespeare.txt", "dialogsum/dialogsum.dev.jsonl"):
        path = os.path.join(data, name)
        if os.path.exists(path):
            lines = read(path).split("\n")[:11000]
            texts += [json.loads(line)["dialogue"] for line in lines if line] if name.endswith("jsonl") else lines
        else:
            skip(name, "the file is absent")
    texts += random_strings(50000 - len(texts), random.Random(options.seed + 2))
    try:
        import tokenizers
        vocabulary = os.path.join(data, "tokenizers", "bert-base-uncased-vocab.txt")
        for mark in ("uncased", "cased"):
            reference = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=mark == "uncased")
            wanted = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
            compare(f"WordPiece, {mark}", texts, encode(options.babygpt, f"{vocabulary}:{mark}", texts, special=True), wanted)
    except ImportError:
        skip("WordPiece", "tokenizers is not installed")
    try:
        import sentencepiece
    except ImportError:
        return skip("SentencePiece", "not installed")
    models = [os.path.join(data, "tokenizers", "sp_test_model.model")]
    with tempfile.TemporaryDirectory() as folder:
        botchan, turkish = os.path.join(data, "text/botchan.txt"), os.path.join(data, "turkish/turkish_all_cc-by-sa.txt")
        for name, source, how in (
                ("bpe", botchan, dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)),
                ("unigram", turkish, dict(user_defined_symbols=["<sep>", "bir"], control_symbols=["<ctl>"], normalization_rule_name="nmt_nfkc_cf")),
                ("suffix", turkish, dict(model_type="bpe", user_defined_symbols=["<sep>", "ir"], treat_whitespace_as_suffix=True))):
            if os.path.exists(source):
                models.append(os.path.join(folder, name + ".model"))
                sentencepiece.SentencePieceTrainer.train(input=source, model_prefix=models[-1][:-6], vocab_size=2000, minloglevel=2, **how)
        for model in models:
            reference = sentencepiece.SentencePieceProcessor(model)
            compare("SentencePiece, " + os.path.basename(model), texts, encode(options.babygpt, model, texts), reference.encode(texts))
            if not os.path.exists(turkish):
                continue
            whole = read(turkish)
            compare("SentencePiece, " + os.path.basename(model) + ", a whole file", [whole], encode(options.babygpt, model, [whole]), [reference.encode(whole)])
            if os.path.basename(model) == "unigram.model":
                # Of our time a third is reading and printing, which the other library does not do here.
                fast = lambda ours, theirs: ours >= 0.8 * theirs
                ours, theirs = speed(options, model, reference.encode, whole, fast)
                result("unigram about as fast as sentencepiece", fast(ours, theirs),
                       f"{ours / 1e6:.1f} MB/s with reading and printing, sentencepiece {theirs / 1e6:.1f} MB/s")


TRAINING_TEXTS = ("text/botchan.txt", "turkish/turkish_all_cc-by-sa.txt")


def in_turns(ours, theirs, fast):
    """The least time of each, taken in turns until ours is fast enough, twenty at most, as a busy machine proves nothing."""
    least = [float("inf")] * 2
    for _ in range(20):
        for i, act in enumerate((ours, theirs)):
            start = time.perf_counter()
            act()
            least[i] = min(least[i], time.perf_counter() - start)
        if fast(*least):
            break
    return least


def fast_enough(ours, theirs):
    """Of the seconds that a training takes here and there."""
    return ours <= 2 * theirs


def judge(name, lines, our_ids, their_ids, seconds):
    """Tokens per character and times of two tokenizers that were trained on the same text."""
    characters = sum(map(len, lines))
    ours, theirs = (sum(map(len, ids)) / characters for ids in (our_ids, their_ids))
    result(f"{name}, trained: within 2 % and twice the time", abs(ours / theirs - 1) <= 0.02 and fast_enough(*seconds),
           f"{ours:.5f} tokens a character in {seconds[0]:.2f} s, the other library {theirs:.5f} ({100 * (ours / theirs - 1):+.2f} %) in {seconds[1]:.2f} s")


def train_wordpiece(options, data):
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    except ImportError:
        return skip("training WordPiece", "tokenizers is not installed")
    for name in TRAINING_TEXTS:
        path = os.path.join(data, name)
        if not os.path.exists(path):
            skip(f"training WordPiece on {name}", "the file is absent")
            continue
        for mark in ("uncased", "cased"):
            with tempfile.TemporaryDirectory() as folder:
                file = os.path.join(folder, "tokenizer.json")
                command = [options.babygpt, "tokenizer", path, "--kind", "wordpiece", "--vocab", "4000", "--threads", "1", "--overwrite", "--out", file]
                reference = Tokenizer(models.WordPiece(unk_token="[UNK]"))
                reference.normalizer = normalizers.BertNormalizer(lowercase=mark == "uncased")
                reference.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
                specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
                seconds = in_turns(
                    lambda: subprocess.run(command + (["--cased"] if mark == "cased" else []), stdout=subprocess.DEVNULL, check=True),
                    lambda: reference.train([path], trainers.WordPieceTrainer(vocab_size=4000, special_tokens=specials, show_progress=False)),
                    fast_enough)
                lines = read(path).split("\n")
                ids = encode(options.babygpt, file, lines)
                judge(f"WordPiece, {mark}, {name}", lines, ids, [e.ids for e in reference.encode_batch(lines, add_special_tokens=False)], seconds)
                loaded = Tokenizer.from_file(file)
                texts = lines + random_strings(5000, random.Random(options.seed + 3))
                compare(f"WordPiece, {mark}, {name}, our own file in tokenizers", texts, encode(options.babygpt, file, texts, special=True),
                        [e.ids for e in loaded.encode_batch(texts, add_special_tokens=False)])


def train_unigram(options, data):
    try:
        import sentencepiece
    except ImportError:
        return skip("training a unigram model", "sentencepiece is not installed")
    for name in TRAINING_TEXTS:
        path = os.path.join(data, name)
        if not os.path.exists(path):
            skip(f"training a unigram model on {name}", "the file is absent")
            continue
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = os.path.join(folder, "ours.model"), os.path.join(folder, "theirs.model")
            command = [options.babygpt, "tokenizer", path, "--kind", "unigram", "--vocab", "4000", "--threads", "1", "--overwrite", "--out", ours]
            seconds = in_turns(
                lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True),
                lambda: sentencepiece.SentencePieceTrainer.train(input=path, model_prefix=theirs[:-6], vocab_size=4000, minloglevel=2),
                fast_enough)
            lines = read(path).replace("\r\n", "\n").split("\n")
            judge(f"unigram, {name}", lines, encode(options.babygpt, ours, lines), sentencepiece.SentencePieceProcessor(theirs).encode(lines), seconds)
            texts = lines + random_strings(5000, random.Random(options.seed + 4)) + [read(path)]
            compare(f"unigram, {name}, our own file in sentencepiece", texts, encode(options.babygpt, ours, texts),
                    sentencepiece.SentencePieceProcessor(ours).encode(texts))


def charsmap_of(model):
    """The precompiled_charsmap of a SentencePiece model: field 2 of its field 3."""
    def fields(data):
        at = 0
        def number():
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value
        while at < len(data):
            key = number()
            size = {0: 0, 1: 8, 5: 4}.get(key & 7)
            if size == 0:
                number()
            size = number() if size is None else size
            yield key >> 3, data[at:at + size]
            at += size
    with open(model, "rb") as file:
        return b"".join(value for field, part in fields(file.read()) if field == 3 for number, value in fields(part) if number == 2)


def compare_unigram(name, path, texts, got, wanted):
    """tokenizers sums scores in double, word by word, we as sentencepiece does: two ways that are equally probable may be told apart otherwise."""
    with open(path, encoding="utf-8") as file:
        scores = [score for _, score in json.load(file)["model"]["vocab"]]
    total = lambda ids: sum(scores[i] for i in ids)
    differ = [i for i in range(len(texts)) if got[i] != wanted[i]]
    ties = {i for i in differ if sorted(got[i]) == sorted(wanted[i]) or abs(total(got[i]) - total(wanted[i])) < 1e-4}
    compare(name + (f" ({len(ties)} with equally probable ways left out)" if ties else ""), texts, got,
            [got[i] if i in ties else wanted[i] for i in range(len(texts))])


def unigram_files(options, data):
    """tokenizer.json of type Unigram: of T5's kind, of the present converter's, and our own of Llama's kind."""
    try:
        import sentencepiece
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    except ImportError:
        return skip("Unigram in tokenizer.json", "tokenizers or sentencepiece is not installed")
    botchan, turkish = (os.path.join(data, name) for name in TRAINING_TEXTS)
    if not all(map(os.path.exists, (botchan, turkish))):
        return skip("Unigram in tokenizer.json", "a text is absent")
    texts = [line for path in (botchan, turkish) for line in read(path).split("\n")[:10000]] + ["", " ", "  two  blanks ", "a\tb\nc", "\u2581x"]
    with tempfile.TemporaryDirectory() as folder:
        path, model = os.path.join(folder, "tokenizer.json"), os.path.join(folder, "t5.model")
        sentencepiece.SentencePieceTrainer.train(input=turkish, model_prefix=model[:-6], vocab_size=4000, minloglevel=2)
        pieces = sentencepiece.SentencePieceProcessor(model)
        metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
        precompiled = normalizers.Precompiled(charsmap_of(model))
        strip = normalizers.Sequence([precompiled, normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "\u2581")])
        for name, normalizer, cutting in (("T5", precompiled, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])),
                                          ("converter", strip, metaspace)):
            reference = Tokenizer(models.Unigram([(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))], pieces.unk_id(), False))
            reference.add_special_tokens(["<unk>", "<s>", "</s>"])
            reference.normalizer, reference.pre_tokenizer, reference.decoder = normalizer, cutting, decoders.Metaspace()
            reference.save(path)
            compare_unigram(f"tokenizer.json of type Unigram as {name}'s", path, texts, encode(options.babygpt, path, texts), [e.ids for e in reference.encode_batch(texts)])
        for extra in ([], ["--byte-fallback"]):
            subprocess.run([options.babygpt, "tokenizer", turkish, "--kind", "unigram", "--vocab", "2000", "--overwrite", "--out", path] + extra, stdout=subprocess.DEVNULL, check=True)
            reference = Tokenizer.from_file(path)
            ids = encode(options.babygpt, path, texts)
            compare_unigram(" ".join(["tokenizer.json of type Unigram, ours"] + extra), path, texts, ids, [e.ids for e in reference.encode_batch(texts)])
            if extra:
                wrong = sum(reference.decode(i) != t for i, t in zip(ids, texts) if "\u2581" not in t)
                result("and tokenizers decodes them", wrong == 0, f"{wrong} of {len(texts)} differ")


if __name__ == "__main__":
    sys.exit(main())
