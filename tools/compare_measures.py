#!/usr/bin/env python3
"""Compares `babygpt measure` with sacrebleu, scikit-learn, and sums written out here, on real and random texts, and what examples/retrieval.cpp
finds with what rank_bm25 finds.

    tools/compare_measures.py [--babygpt build/babygpt] [--retrieval build/examples/retrieval] [--encoder M.safetensors] [--shared ../shared]

What is missing is skipped with a line that says so.
"""
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile

chosen = dict(zip(sys.argv[1::2], sys.argv[2::2]))
babygpt, shared = chosen.get("--babygpt", "build/babygpt"), chosen.get("--shared", "../shared")
retrieval = chosen.get("--retrieval", "build/examples/retrieval")
passed = failed = 0
rng = random.Random(1)


def check(what, good, found):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print(f"{'ok' if good else 'FAILED'}  {what}: {found}")


def measure(kind, *texts, options=()):
    """Each text is a list of lines."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for lines in texts:
            paths.append(os.path.join(folder, str(len(paths))))
            with open(paths[-1], "w", encoding="utf-8", newline="") as file:
                file.write("".join(line + "\n" for line in lines))
        return json.loads(subprocess.run([babygpt, "measure", kind, *paths, "--json", *options], check=True, stdout=subprocess.PIPE).stdout)


@functools.lru_cache(maxsize=None)  # what is absent is said once
def records(name):
    path = os.path.join(shared, "data", name)
    if not os.path.exists(path):
        print(f"skipped: {path} is absent")
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file] if name.endswith("jsonl") else [line.rstrip("\n") for line in file]


def one_line(text):
    return " ".join(text.split())


def noisy(text):
    """Some words left out, twice, or exchanged."""
    words = text.split(" ")
    for _ in range(len(words) // 4):
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i] = rng.choice(["", words[i] + " " + words[i], words[j], words[i].lower(), "&quot;" + words[i]])
    return " ".join(words)


def random_line(alphabet, longest):
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(longest)))


def against_sacrebleu():
    try:
        import sacrebleu
    except ImportError:
        return print("skipped: sacrebleu is not here")
    cases = []
    tests = records("dialogsum/dialogsum.test.jsonl")
    if tests:
        summaries = [[one_line(r[f"summary{k}"]) for r in tests] for k in (1, 2, 3)]
        cases += [("DialogSum, one person's summaries against another's", summaries[0], summaries[1:2]),
                  ("DialogSum, against two persons'", summaries[0], summaries[1:]),
                  ("DialogSum, with noise", [noisy(s) for s in summaries[1]], summaries),
                  ("DialogSum, too short", [" ".join(s.split()[:4]) for s in summaries[1]], summaries[:2])]
    for name in ("parallel/tur-eng_manythings.tsv", "parallel/ud_atis_en-tr.dev.tsv", "text/tinyshakespeare.txt"):
        lines = [line.split("\t")[-1] for line in records(name)][:3000]
        if lines:
            cases.append((name, [noisy(line) for line in lines], [lines]))
    symbols = "ab1.,-'&;:/<>[]{}~^ \u00e9\u0130\u2019\u00a0\u3000\u2009\u20ac"
    for seed in range(20):
        texts = [[random_line(symbols, 60) for _ in range(60)] for _ in range(2)]
        cases.append((f"random symbols {seed}", [noisy(t) for t in texts[0]], [texts[0], texts[1]]))
    cases += [("the same", ["The cat sat on the mat."], [["The cat sat on the mat."]]), ("nothing agrees", ["a b c d e"], [["f g h i j"]]),
              ("empty", [""], [["a b c"]]), ("two words", ["a b"], [["a b"]]), ("only words agree", ["a c b e d"], [["a b c d e"]]),
              ("entities", ["&amp;lt; 3.5, 1,000-fold <skipped> x-y it's \"so\""], [["< 3.5, 1,000-fold x-y it's &quot;so&quot;"]])]
    for what, hypotheses, references in cases:
        theirs, ours = sacrebleu.corpus_bleu(hypotheses, references), measure("bleu", hypotheses, *references)
        good = abs(theirs.score - ours["bleu"]) < 1e-6 and (theirs.sys_len, theirs.ref_len) == (ours["hypothesis_words"], ours["reference_words"])
        check(f"BLEU, {what}", good and f"{theirs.score:.2f}" == f"{ours['bleu']:.2f}", f"{ours['bleu']:.4f}, sacrebleu {theirs.score:.4f}")


def against_scikit_learn():
    try:
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError:
        return print("skipped: scikit-learn is not here")
    for names, right in ((("0", "1"), 0.8), (("0", "1"), 0), (("yes", "no"), 0.6), (tuple("abcdefg"), 0.5), (("b\u00fcy\u00fck", "k\u00fc\u00e7\u00fck", "x"), 0.9)):
        real = [rng.choice(names[:-1] if len(names) > 2 else names) for _ in range(1000)]
        predicted = [r if rng.random() < right else rng.choice(names) for r in real]
        ours = measure("accuracy", predicted, real, options=["--positive", names[1]])
        theirs = (accuracy_score(real, predicted), f1_score(real, predicted, average="macro"),
                  f1_score(real, predicted, labels=[names[1]], average=None)[0])
        found = (ours["accuracy"], ours["f1_macro"], ours["f1"])
        check(f"accuracy, macro F1, F1 of {names[1]} of {len(names)}", max(abs(a - b) for a, b in zip(found, theirs)) < 1e-8, found)
    real, predicted = [str(rng.randrange(2)) for _ in range(99)], ["0"] * 99
    check("binary F1 where 1 is never said", measure("accuracy", predicted, real)["f1"] == f1_score(list(map(int, real)), list(map(int, predicted))), 0)


def against_sums():
    lines = [one_line(r["summary"]) for r in records("dialogsum/dialogsum.dev.jsonl")] + ["a a a a a a", "", "one"]
    grams = {n: [tuple(w[i:i + n]) for w in map(str.split, lines) for i in range(len(w) - n + 1)] for n in (1, 2, 4)}
    shares = {n: len(set(g)) / len(g) for n, g in grams.items()}
    ours = measure("distinct", lines)
    good = abs(ours["distinct_1"] - shares[1]) + abs(ours["distinct_2"] - shares[2]) + abs(ours["repetition"] - 1 + shares[4]) < 1e-8
    check("distinct-1, distinct-2, repetition", good, ours)
    dialogues = records("dialogsum/dialogsum.dev.jsonl")
    if dialogues:  # a text that quotes
        training = "\n".join(r["dialogue"] for r in dialogues) + "\n"
        output = "".join(training[i:i + rng.randrange(200)] + random_line("abc \u00e9", 80) for i in rng.sample(range(len(training)), 60)) + "\n"
        spans = [output[i:i + 50] for i in range(len(output) - 49)]
        copied = sum(span in training for span in spans)
        fits = [0, len(output) + 1]  # the longest length that is copied, and one that is not
        while fits[1] - fits[0] > 1:
            middle = sum(fits) // 2
            fits[not any(output[i:i + middle] in training for i in range(len(output) - middle + 1))] = middle
        ours = measure("copied", [output[:-1]], [training[:-1]])
        good = (ours["spans"], ours["copied_spans"], ours["longest"], len(ours["text"])) == (len(spans), copied, fits[0], fits[0])
        check("copied", good and ours["text"] in training and ours["text"] in output, f"{copied} of {len(spans)} spans, longest {fits[0]}")


def against_rank_bm25():
    """Each summary of DialogSum's dev file as a question, the dialogues as documents. With --encoder M by vectors and by both, too."""
    dialogues = records("dialogsum/dialogsum.dev.jsonl")
    try:
        from rank_bm25 import BM25Okapi
    except ImportError:
        return print("skipped: rank_bm25 is not here")
    if not dialogues or not os.path.exists(retrieval):
        return print(f"skipped: {retrieval} or its documents are absent")
    words = [re.findall("[a-z0-9\x80-\U0010ffff]+", r["dialogue"].lower()) for r in dialogues]
    questions = [one_line(r["summary"]) for r in dialogues]
    reference = BM25Okapi(words)
    encoder = ["-e", chosen["--encoder"]] if "--encoder" in chosen else []
    found = subprocess.run([retrieval, *encoder, "-f", "dialogue", "-", os.path.join(shared, "data", "dialogsum/dialogsum.dev.jsonl")],
                           input="".join(q + "\n" for q in questions).encode(), check=True, stdout=subprocess.PIPE).stdout.decode()
    answers = re.split(r"\n\n(?=[0-9.]+ by |No document|$)", found)
    n, theirs, ours = len(questions), 0, {}
    for i, (question, answer) in enumerate(zip(questions, answers)):
        for how, number in re.findall(r"^-?[0-9.]+ by (\w+)\t.*, document ([0-9]+)\t", answer, re.M):
            ours[how] = ours.get(how, 0) + (i + 1 == int(number))
        scores = reference.get_scores(re.findall("[a-z0-9\x80-\U0010ffff]+", question.lower()))
        theirs += i in sorted(range(len(scores)), key=lambda d: -scores[d])[:5]
    good = len(answers) >= n and ours["words"] >= 0.95 * theirs
    check("retrieval, recall@5", good, ", ".join(f"by {how} {right / n:.3f}" for how, right in ours.items()) + f", rank_bm25 {theirs / n:.3f} of {n} questions")


def against_numpy():
    """The neighbours of words in the vectors of a small model of the village."""
    try:
        import numpy
    except ImportError:
        return print("skipped: numpy is not here")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.safetensors")
        subprocess.run([babygpt, "train", "examples/village.txt", "--out", path, *"--preset nano --tokenizer bpe:800 --steps 8 --no-counting --json".split()],
                       check=True, stdout=subprocess.DEVNULL)
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["wte.weight"]
            start, end = header["data_offsets"]
            file.seek(start, 1)
            table = numpy.frombuffer(file.read(end - start), "<f4").reshape(header["shape"]).astype("f8")
        table /= numpy.linalg.norm(table, axis=1, keepdims=True)
        encode = lambda word: list(map(int, subprocess.run([babygpt, "encode", path], input=word.encode(), stdout=subprocess.PIPE).stdout.split()))
        for words in (["coins"], ["Mira", "-", "Pip", "+", "Hilda"]):
            used = [min(encode(" " + w), encode(w), key=len) for w in words[::2]]
            single = all(len(ids) == 1 for ids in used)
            aim = sum(sign * table[ids[0]] for sign, ids in zip([1, -1, 1], used))
            cosines = table @ aim / numpy.linalg.norm(aim)
            wanted = [i for i in numpy.argsort(-cosines) if [i] not in used and i != len(table) - 1][:10]
            found = json.loads(subprocess.run([babygpt, "nearest", path, *words, "--json"], check=True, stdout=subprocess.PIPE).stdout)["neighbours"]
            good = [n["id"] for n in found] == wanted and all(abs(n["cosine"] - cosines[n["id"]]) < 1e-6 for n in found)
            check("nearest " + " ".join(words), single and good, [n["token"] for n in found][:4])


against_sacrebleu()
against_scikit_learn()
against_sums()
against_rank_bm25()
against_numpy()
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
