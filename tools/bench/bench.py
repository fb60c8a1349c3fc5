#!/usr/bin/env python3
"""Measures babygpt in turns with PyTorch and llama.cpp, and against what this machine can do at all.

    make bench                                              all works, five turns each
    make bench options="--pairs 1 train-96 'decode-*'"      some of them
    python3 tools/bench/bench.py --list                     which there are
    make cuda-bench                                         those of an NVIDIA GPU (--cuda), one turn each

A turn is: a ceiling, babygpt, the peer; each a fresh process. Quoted are the median of the turns, and the least and the most. The share is of
the FMA ceiling, or, where every token reads all weights, of the tokens/s that the read bandwidth of as many bytes allows; both are measured in
the same turn. sh tools/bench/peers.sh installs the peers; without them their columns are left out.
Needs nothing but Python's standard library.
"""
import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LAYERS, WIDTH = 6, 384  # the baby


class Failed(Exception):
    pass


# ---- Processes --------------------------------------------------------------------------------------------------------

class Process:
    """Runs a command to its end: what it printed, when the first byte of it came (seconds), and its peak memory (MB, or None)."""

    def __init__(self, command, environment=None, limit=900):
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
        for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # they would slow the peers down
            env.pop(name, None)
        with tempfile.TemporaryFile() as errors:
            start = time.perf_counter()
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env, bufsize=0)
            timer = threading.Timer(limit, child.kill)
            timer.start()
            try:
                output = child.stdout.read(1)
                self.first = time.perf_counter() - start
                output += child.stdout.read()
                self.memory = None
                if hasattr(os, "wait4"):
                    _, status, usage = os.wait4(child.pid, 0)
                    child.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
                    self.memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
            finally:
                timer.cancel()
                if child.returncode is None:
                    child.kill() if sys.exc_info()[0] else None
                    child.wait()
                child.stdout.close()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
        self.lines = output.decode(errors="replace").splitlines()
        if child.returncode != 0:
            raise Failed(f"{os.path.basename(command[0])} ended with {child.returncode}: {said[-1] if said else 'no message'}")

    def json(self):
        try:
            return json.loads(self.lines[-1])
        except (IndexError, ValueError):
            raise Failed("no JSON object came") from None


class Machine:
    """Where the programs are, and how each kind of work is measured. Each method takes one measurement."""

    def __init__(self, options):
        self.babygpt_path, self.ceilings_path, self.folder = options.babygpt, options.ceilings, options.folder
        self.threads, self.seconds = options.threads, options.seconds
        self.peers = {}  # the Python that has it
        if "none" not in options.peers:
            for module in ("torch", "llama_cpp"):
                for place in options.peers:
                    python = os.path.join(place, "Scripts" if os.name == "nt" else "bin", "python")
                    find = f"import importlib.util as u, sys; sys.exit(not u.find_spec('{module}'))"
                    if os.path.exists(python) and subprocess.call([python, "-c", find], stderr=subprocess.DEVNULL) == 0:
                        self.peers.setdefault(module, python)
        self.version = Process([self.babygpt_path, "--version"]).lines[0]
        if options.cuda:
            self.babygpt(*cuda_words(1, 8, "f32"), "--preset", "tiny", seconds=0.01)  # is there one?
            self.all_ceilings = []
            return
        self.all_ceilings = [json.loads(line) for line in Process([self.ceilings_path, "--json", "--threads", self.some_threads(),
                                                                   "--seconds", str(min(0.3, self.seconds))]).lines]

    def some_threads(self):
        return "1" if self.threads == 1 else f"1,{self.threads}"

    def babygpt(self, *words, threads=None, seconds=None):
        return Process([self.babygpt_path, *map(str, words), "--threads", str(threads or self.threads)] +
                       (["--seconds", str(seconds or self.seconds), "--json"] if words[0] == "bench" else []))

    def torch(self, *words, threads=None, seconds=None):
        environment = {"THP_MEM_ALLOC_ENABLE": "1", "TORCHINDUCTOR_CACHE_DIR": os.path.abspath(os.path.join(self.folder, "inductor"))}
        return Process([self.peers["torch"], os.path.join(HERE, "torch_train.py"), *map(str, words), "--threads", str(threads or self.threads),
                        "--seconds", str(seconds or self.seconds)], environment)

    def llama(self, *words):
        return Process([self.peers["llama_cpp"], os.path.join(HERE, "llama_decode.py"), *map(str, words), "--threads", str(self.threads),
                        "--seconds", str(self.seconds)])

    def ceiling(self, names, threads, size=0):
        """The best of these ceilings now, in billions a second; those that this machine does not have are passed over.

        Arithmetic: not less than when the run began, as another program may have held a core just now. Reading: as it is now, for that changes.
        """
        there = {c["ceiling"]: c["best"] for c in self.all_ceilings if c["best"] is not None and c["threads"] == threads}
        names = [name for name in names if name in there]
        if not names:
            return None
        words = ["--json", "--only", ",".join(names), "--threads", str(threads), "--seconds", "0.2"]
        now = [json.loads(line)["best"] for line in Process([self.ceilings_path] + words + (["--bytes", str(size)] if size else [])).lines]
        return max(now + ([] if size else [there[name] for name in names]))

    def model(self, vocab, dtype="f32"):
        """A baby with this vocabulary, which babygpt makes from as many different characters in one step; newer than babygpt itself."""
        path = os.path.join(self.folder, f"baby-{vocab}{'' if dtype == 'f32' else '-' + dtype}.safetensors")
        if os.path.exists(path) and os.path.getmtime(path) >= os.path.getmtime(self.babygpt_path):
            return path
        if dtype != "f32":
            self.babygpt("convert", self.model(vocab), "--dtype", dtype, "--out", path, "--overwrite")
            return path
        text = os.path.join(self.folder, f"characters-{vocab}.txt")
        with open(text, "w", encoding="utf-8", newline="\n") as file:
            file.write((characters(vocab - 2) + "\n") * max(1, 3000 // vocab))  # a line's end and the end of a document are tokens too
        self.babygpt("train", text, "--out", path, "--overwrite", "--preset", "baby", "--tokenizer", "char", "--steps", 1, "--batch", 1,
                     "--validation-fraction", 0)
        os.remove(path.replace(".safetensors", ".resume.safetensors"))
        found = self.babygpt("info", path, "--json").json()["vocab"]
        if found != vocab:
            raise Failed(f"{path} has a vocabulary of {found}, not of {vocab}")
        if "llama_cpp" in self.peers:
            self.check_peer(path, vocab)
        return path

    def check_peer(self, path, vocab):
        """What is compared must be the same model: llama.cpp gives babygpt's log-probabilities, as far as its half-precision cache allows."""
        with open(os.path.join(self.folder, "line.jsonl"), "w+", encoding="utf-8") as line:
            json.dump({"text": characters(vocab - 2)[:90]}, line)
            line.seek(0)
            ours = json.loads(subprocess.run([self.babygpt_path, "score", path, "--jsonl"], stdin=line, capture_output=True, check=True).stdout)
        theirs = self.llama(path, "--dtype", "f32", "--score", ",".join(map(str, ours["ids"]))).json()["logprobs"]
        difference = max(abs(a - b) for a, b in zip(ours["logprobs"][1:], theirs))
        if not difference < 0.01 or len(theirs) + 1 != len(ours["ids"]):
            raise Failed(f"llama.cpp computes something else: its log-probabilities differ by {difference:.3g}")


def gpu_name():
    try:
        return Process(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).lines[0]
    except (Failed, OSError, IndexError):
        return "an NVIDIA GPU"


def characters(count):
    """So many different characters that are no white space, beginning with '!'."""
    codes = (code for code in range(0x21, 0x110000) if not 0xD800 <= code < 0xE000 and not chr(code).isspace() and code != 0xFEFF)
    return "".join(chr(next(codes)) for _ in range(count))


# ---- Works ------------------------------------------------------------------------------------------------------------

FMA = ("fma128", "fma256", "fma512")


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().split("\n\n")[0].split()
    except OSError:
        return []


AMX = "amx_bf16" in processor()  # with which babygpt multiplies bf16: its bars are other ones there
PAIRS = "avx512_bf16" in processor() and "AuthenticAMD" in processor()


class Bar:
    """ratio and share: the lower of the two is enough. floor: a ratio below which it must never fall. most: of babygpt's own figure."""

    def __init__(self, ratio=None, share=None, floor=None, most=None):
        self.ratio, self.share, self.floor, self.most = ratio, share, floor, most

    def marks(self, value, ratio, share):
        """(text, whether it is held or None for unknown) of each condition."""
        def held(figure, least):
            return None if figure is None else figure >= least
        result = []
        if self.most is not None:
            result.append((f"<= {self.most:g}", None if value is None else value <= self.most))
        if self.ratio is not None:
            result.append((f"{self.ratio:g} x", held(ratio, self.ratio)))
        if self.share is not None:
            result.append((f"{self.share:.0%}".replace("%", " %"), held(share, self.share)))
        return result, (f"never below {self.floor:g} x", held(ratio, self.floor)) if self.floor is not None else None

    def held(self, value, ratio, share):
        either, floor = self.marks(value, ratio, share)
        marks = [mark for _, mark in either]
        good = True if True in marks or not marks else None if None in marks else False
        if floor is None or good is False or floor[1] is True:
            return good
        return floor[1]  # missed, or not known


class Work:
    """What is measured in each turn. ours and peer are functions of the machine that return a figure; peer_name may hold several to try."""

    def __init__(self, key, title, ours, unit="tokens/s", peer=None, peers=(), needs=None, bound=None, bar=None, pairs=None, less=False):
        self.key, self.title, self.ours, self.unit, self.peer, self.peers, self.needs = key, title, ours, unit, peer, list(peers), needs
        self.bound, self.bar, self.pairs, self.less = bound, bar or Bar(), pairs, less
        self.figures, self.peer_figures, self.ratios, self.shares, self.bounds, self.note = [], [], [], [], [], ""

    def summary(self):
        def spread(values):
            return {"median": statistics.median(values), "least": min(values), "most": max(values)} if values else None
        ours, ratio, share = spread(self.figures), spread(self.ratios), spread(self.shares)
        middle = [s["median"] if s else None for s in (ours, ratio, share)]
        held = self.bar.held(*middle) if self.figures else None
        return {"work": self.key, "title": self.title, "unit": self.unit, "ours": ours, "peer_name": self.peers[0] if self.peer_figures else None,
                "peer": spread(self.peer_figures), "ratio": ratio, "share": share, "bound": spread(self.bounds), "turns": len(self.figures),
                "bar": {k: v for k, v in vars(self.bar).items() if v is not None}, "held": held, "note": self.note}

    def turn(self, machine, step):
        """One measurement of each; step(name) is called before each."""
        bound = None
        if self.bound:
            step("ceiling")
            bound = self.bound(machine)
        step("babygpt")
        figure = self.ours(machine)
        peer = None
        while self.peer and self.peers and (not self.needs or self.needs in machine.peers):
            step(self.peers[0])
            try:
                peer = self.peer(machine, self.peers[0])
                break
            except Failed as failure:
                self.note = f"{self.peers[0]}: {failure}"
                if self.peer_figures:
                    break
                self.peers.pop(0)  # the next best, if there is one
        self.figures.append(figure)
        if bound:
            self.bounds.append(bound)
            self.shares.append(figure / bound)
        if peer:
            self.peer_figures.append(peer)
            self.ratios.append(peer / figure if self.less else figure / peer)


def weight_bytes(vocab, size):
    """What a token reads of the baby: all matrices, in numbers of this size, and biases and norms as floats."""
    return (LAYERS * 12 * WIDTH * WIDTH + vocab * WIDTH) * size + (LAYERS * 13 + 2) * WIDTH * 4


def forward_flops(vocab, context=192, width=WIDTH):
    """Multiply-adds x 2 of a token's products, attention counted causally; training takes three times that."""
    return LAYERS * (24 * width * width + 2 * width * (context + 1)) + 2 * width * vocab


def speed(*words, **how):
    return lambda machine: machine.babygpt("bench", *words, **how).json()["tokens_per_second"]


def fma_bound(flops, threads=None, names=FMA):
    def bound(machine):
        ceiling = machine.ceiling(names, threads or machine.threads)
        return ceiling and ceiling * 1e9 / flops
    return bound


def works(threads, cores):
    """All of them, for so many threads."""
    many = f"{threads} threads" if threads > 1 else "1 thread"
    result = []

    def add(*words, **how):
        result.append(Work(*words, **how))

    for vocab, bars in ((96, (Bar(1.35, 0.75, floor=1.1), Bar(1.3, 0.78))), (50257, (Bar(1.4, 0.75), Bar(1.4, 0.75)))):
        for n, bar in zip((threads, 1) if threads > 1 else (1,), bars if threads > 1 else bars[1:]):
            add(f"train-{vocab}" + ("-1" if n < threads else ""), f"training f32, V={vocab}, {many if n > 1 else '1 thread'}",
                speed("train", "--vocab", vocab, threads=n), bound=fma_bound(3 * forward_flops(vocab), n), bar=bar, peers=["PyTorch"],
                needs="torch", peer=lambda m, _, v=vocab, n=n: m.torch("--vocab", v, threads=n).json()["tokens_per_second"])
    best = "bf16" if AMX or PAIRS else "f32"  # of PyTorch's: on other processors its bf16 is some thirty times slower
    for vocab, bar in ((96, Bar(2.2) if AMX else Bar(1.4, 0.65) if PAIRS else Bar()), (50257, Bar(2 if AMX else 1.2))):
        add(f"train-{vocab}-bf16", f"training bf16, V={vocab}, {many}", speed("train", "--precision", "bf16", "--vocab", vocab),
            bound=fma_bound(3 * forward_flops(vocab), names=("amx_bf16",) if AMX else ("bf16",) if PAIRS else FMA), bar=bar, peers=["PyTorch " + best],
            needs="torch", peer=lambda m, _, v=vocab: m.torch("--vocab", v, "--dtype", best).json()["tokens_per_second"])
    add("train-256", f"training f32, V=96, {many}, 256-bit kernels", speed("train", "--isa", "avx2"),
        bound=fma_bound(3 * forward_flops(96), names=("fma256",)), bar=Bar(share=0.72))
    for dtype, names in (("f32", FMA), ("bf16", FMA + ("bf16", "amx_bf16"))):
        add(f"prompt-{dtype}", f"prompt of 192, V=96, {dtype}, {many}",
            lambda m, d=dtype: m.babygpt("bench", "prefill", "--model", m.model(96), "--dtype", d).json()["tokens_per_second"],
            bound=fma_bound(forward_flops(96), names=names), bar=Bar(1.5), peers=["llama.cpp " + dtype], needs="llama_cpp",
            peer=lambda m, name: m.llama(m.model(96), "--what", "prefill", "--dtype", name.split()[-1]).json()["tokens_per_second"])
    for vocab, ratios in ((96, (1.4, 2, 2.5)), (50257, (1.2, 1.4, 2))):
        for dtype, size, ratio in zip(("f32", "bf16", "int8"), (4, 2, 1), ratios):
            add(f"decode-{vocab}-{dtype}", f"generation, V={vocab}, {dtype}, {many}",
                lambda m, v=vocab, d=dtype: m.babygpt("bench", "decode", "--model", m.model(v), "--dtype", d).json()["tokens_per_second"],
                bound=lambda m, n=weight_bytes(vocab, size): m.ceiling(["read"], m.threads, n) * 1e9 / n, bar=Bar(ratio, 0.85),
                peers=["llama.cpp q8_0", "llama.cpp bf16", "llama.cpp f32"] if dtype == "int8" else ["llama.cpp " + dtype], needs="llama_cpp",
                peer=lambda m, name, v=vocab: m.llama(m.model(v), "--dtype", name.split()[-1]).json()["tokens_per_second"])
    add("sessions", "eight sessions as a batch, V=96", speed("decode", "--sessions", 8), bar=Bar(4), peers=["one session"],
        peer=lambda m, _: speed("decode")(m))
    for vocab, most in ((96, 400), (50257, 850)):
        add(f"memory-{vocab}", f"peak memory of training, B=8, V={vocab}", unit="MB", bar=Bar(most=most), less=True, pairs=1, peers=["PyTorch"],
            needs="torch", ours=lambda m, v=vocab: m.babygpt("bench", "train", "--vocab", v, seconds=0.01).memory,
            peer=lambda m, _, v=vocab: m.torch("--vocab", v, seconds=0.01).memory)
    add("idle", "CPU time between two tokens", unit="% of a core", bar=Bar(most=0.5),
        ours=lambda m: m.babygpt("bench", "idle", seconds=1).json()["percent_of_a_core"])
    for what, title in (("train", "training"), ("decode", "generation")):
        add(f"crowded-{what}", f"{title} f32, V=96, {2 * cores} threads, {cores} cores", speed(what, threads=2 * cores), bar=Bar(0.85),
            peers=[f"with {cores}"], peer=lambda m, _, what=what: speed(what, threads=cores)(m))
    add("start", "first token from process start, int8", unit="ms", bar=Bar(most=30), less=True,
        ours=lambda m: 1e3 * statistics.median(m.babygpt("generate", m.model(96, "int8"), "--prompt", "A", "--tokens", 1).first
                                               for _ in range(5)))
    for context, width, batch in ((192, 384, 8), (768, 384, 2), (3072, 384, 1), (192, 768, 8)):
        add(f"growth-{context}-{width}", f"training f32, T={context}, width {width}, B={batch}",
            speed("train", "--context", context, "--width", width, "--batch", batch),
            bound=fma_bound(3 * forward_flops(96, context, width)), bar=Bar(share=0.60))
    return result


GPU_FLOPS = 790e12  # of bf16 products on an H100 or H200, as measured with large ones


def cuda_words(batch, vocab, precision):
    return ["bench", "train", "--backend", "cuda", "--precision", precision, "--batch", batch, "--vocab", vocab]


def cuda_works():
    """Training on an NVIDIA GPU. Bars are of issue-sized work on an H200: tokens/s, or milliseconds a step."""
    result = []

    def add(key, title, batch, vocab, precision, peer=True, unit="tokens/s", figure="tokens_per_second", scale=1.0, **how):
        result.append(Work(
            key, title, lambda m: scale * m.babygpt(*cuda_words(batch, vocab, precision)).json()[figure], unit,
            peer=lambda m, name: scale * m.torch("--device", "cuda", "--batch", batch, "--vocab", vocab, "--dtype", precision,
                                                 *(["--graphs"] if "graphs" in name else [])).json()[figure],
            peers=["PyTorch, CUDA graphs", "PyTorch"] if peer else [], needs="torch", **how))

    def bound(vocab):
        return lambda m: GPU_FLOPS / (3 * forward_flops(vocab))

    add("cuda-512", "training bf16, B=512, V=96", 512, 96, "bf16", bound=bound(96), bar=Bar(1.5))
    add("cuda-64", "a step bf16, B=64, V=96", 64, 96, "bf16", unit="ms", figure="ms", less=True, bar=Bar(most=3.5))
    add("cuda-512-tf32", "training tf32, B=512, V=96", 512, 96, "tf32", peer=False)
    add("cuda-512-f32", "training f32, B=512, V=96", 512, 96, "f32", peer=False)
    add("cuda-large", "training bf16, B=512, V=50304", 512, 50304, "bf16", bound=bound(50304), bar=Bar(1.5))
    for streams, most in ((1, 70), (256, 171)):  # of 256: 1.5 million tokens a second
        result.append(Work(f"cuda-decode-{streams}", f"generation bf16, {'a token' if streams == 1 else f'a round of {streams}'}, V=96",
                           lambda m, n=streams: 1e3 * m.babygpt("bench", "decode", "--backend", "cuda", "--precision", "bf16", "--sessions", n).json()["ms"],
                           "us", less=True, bar=Bar(most=most)))
    for batch, most in ((64, 1.3), (512, 8)):
        add(f"cuda-memory-{batch}", f"memory bf16, B={batch}, V=96", batch, 96, "bf16", peer=False, unit="GiB", figure="device_bytes", scale=2.0 ** -30,
            less=True, pairs=1, bar=Bar(most=most))
    return result


# ---- What people see --------------------------------------------------------------------------------------------------

MARK = {True: "\u2713", False: "\u2717", None: "?"}


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def row(summary, bar):
    """The cells of a work's line."""
    if not summary["ours"]:
        return [summary["title"], summary["note"] or "not measured", "", "", "", "", ""]
    ours, peer, ratio, share = (summary[key] for key in ("ours", "peer", "ratio", "share"))
    either, floor = bar.marks(*[s["median"] if s else None for s in (ours, ratio, share)])
    conditions = " or ".join(f"{text} {MARK[mark]}" for text, mark in either)
    if floor:
        conditions += f", {floor[0]} {MARK[floor[1]]}"
    return [summary["title"], f"{number(ours['median'])} {summary['unit']}", f"{number(peer['median'])} {summary['peer_name']}" if peer else "",
            f"{ratio['median']:.2f} [{ratio['least']:.2f}..{ratio['most']:.2f}]" if ratio else "",
            f"{100 * share['median']:.1f} %" if share else "", conditions.replace("<=", "\u2264").replace(" x", " \u00d7"),
            {True: "held", False: "MISSED", None: "unknown"}[summary["held"]]]


def show(rows):
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    for number_of, cells in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
        if number_of == 0:
            print("\u2500" * (sum(widths) + 2 * len(widths) - 2))


def show_ceilings(ceilings, threads):
    print(f"{'ceilings; threads:':<30}" + "".join(f"{n:>9}" for n in sorted({1, threads})))
    titles = dict.fromkeys(c["title"] for c in ceilings)
    for title in titles:
        rates = [c for c in ceilings if c["title"] == title]
        print(f"{title:<30}" + "".join(f"{'none' if c['best'] is None else format(c['best'], ',.4g'):>9}" for c in rates) + f"  {rates[0]['unit']}")
    print()


class Progress:
    """One line on standard error: what runs, and how long the rest will take. Durations are learnt as they are seen."""

    def __init__(self, jobs, options, machine):
        self.jobs, self.seen, self.since, self.name, self.work, self.seconds = jobs, {}, None, None, None, options.seconds
        self.machine, self.done, self.terminal = machine, 0, sys.stderr.isatty()

    def guess(self, work, name):
        return self.seen.get((work.key, name)) or self.seen.get(name) or {"ceiling": 0.8, "PyTorch": self.seconds + 20}.get(name, self.seconds + 1)

    def turn_length(self, work):
        names = (["ceiling"] if work.bound else []) + ["babygpt"]
        if work.peer and work.peers and (not work.needs or work.needs in self.machine.peers):
            names.append(work.peers[0])
        return sum(self.guess(work, name) for name in names)

    def step(self, work, name):
        self.end()
        left = sum(self.turn_length(other) for other in self.jobs[self.done:])
        self.since, self.name, self.work = time.perf_counter(), name, work
        text = f"[{self.done + 1}/{len(self.jobs)}] {work.key}: {name}; {int(left) // 60}:{int(left) % 60:02d} left"
        if self.terminal:
            print("\r\x1b[K" + text, end="", file=sys.stderr, flush=True)
        elif name == "babygpt":
            print(text, file=sys.stderr, flush=True)

    def end(self):
        if self.since is not None:
            self.seen[self.name] = self.seen[self.work.key, self.name] = time.perf_counter() - self.since
            self.since = None

    def clear(self):
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---- main -------------------------------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("works", nargs="*", metavar="WORK", help="names as --list shows them, * stands for anything (all)")
    parser.add_argument("--list", action="store_true", help="the works' names")
    parser.add_argument("--cuda", action="store_true", help="the works of an NVIDIA GPU, with a babygpt that make cuda has built")
    parser.add_argument("--save", metavar="FILE", help="what --json prints, there as well")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each work (5)")
    parser.add_argument("--seconds", type=float, default=3, help="how long each is measured in a turn (3)")
    parser.add_argument("--threads", type=int, default=cores, help="how many (all cores)")
    parser.add_argument("--peers", action="append", help="a virtual environment that has PyTorch or llama-cpp-python; may be given twice; none: "
                        "no peers (build/peers)")
    parser.add_argument("--babygpt", default="build/babygpt")
    parser.add_argument("--ceilings", default="build/ceilings")
    parser.add_argument("--folder", default="build/bench", help="for models and caches (build/bench)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: this machine, each ceiling, each work")
    options = parser.parse_args()
    options.peers = options.peers or ["build/peers"] + ([sys.prefix] if options.cuda else [])
    if options.pairs < 1 or options.seconds <= 0 or options.threads < 1:
        parser.error("--pairs, --seconds and --threads must be more than nothing")
    chosen = cuda_works() if options.cuda else works(options.threads, cores)
    unknown = [word for word in options.works if not fnmatch.filter([work.key for work in chosen], word)]
    if unknown:
        parser.error(f"no work is called {unknown[0]}; --list shows them")
    chosen = [work for work in chosen if not options.works or any(fnmatch.fnmatch(work.key, word) for word in options.works)]
    return options, chosen


def measure(machine, chosen, options, finished):
    jobs = [work for work in chosen for _ in range(work.pairs or options.pairs)]
    progress = Progress(jobs, options, machine)
    try:
        for i, work in enumerate(jobs):
            progress.done = i
            if not work.note or work.figures:
                try:
                    work.turn(machine, lambda name: progress.step(work, name))
                except Failed as failure:
                    work.note = str(failure)
                except KeyboardInterrupt:
                    if work.figures:
                        finished(work)
                    raise
            progress.end()
            if i + 1 == len(jobs) or jobs[i + 1] is not work:
                progress.clear()
                finished(work)
    finally:
        progress.clear()


def main():
    options, chosen = parse()
    if options.list:
        for work in chosen:
            print(f"{work.key:<20} {work.title}")
        return 0
    os.makedirs(options.folder, exist_ok=True)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if busy > 0.5:
        print(f"note: other programs are running (load {busy:.1f}): the figures will be low and scattered", file=sys.stderr)
    rows = [["work", "babygpt", "peer", "ratio [least..most]", "share", "bar", ""]]
    code = 0
    try:
        try:
            machine = Machine(options)
        except Failed as failure:
            if not options.cuda:
                raise
            print(f"skipped: {failure}")
            return 0
        missing = [name for module, name in (("torch", "PyTorch"), ("llama_cpp", "llama.cpp"))[: 1 if options.cuda else 2]
                   if module not in machine.peers]
        if missing and "none" not in options.peers:
            print(f"note: {' and '.join(missing)}: not in {', '.join(options.peers)}, left out (sh tools/bench/peers.sh installs them)",
                  file=sys.stderr)
        about = {"version": machine.version, "cpu": machine.all_ceilings[0]["cpu"] if machine.all_ceilings else gpu_name(), "threads": options.threads, "pairs": options.pairs,
                 "seconds": options.seconds, "load": busy, "peers": sorted(machine.peers)}
        if options.json:
            for line in [about] + machine.all_ceilings:
                print(json.dumps(line), flush=True)
        else:
            print(f"{machine.version}; {about['cpu']}, {options.threads} threads; {options.pairs} turns, {options.seconds:g} s each\n")
            if machine.all_ceilings:
                show_ceilings(machine.all_ceilings, options.threads)
        saved = open(options.save, "w", encoding="utf-8") if options.save else None
        if saved:
            print(json.dumps(about), file=saved, flush=True)

        def finished(work):
            if saved:
                print(json.dumps(work.summary()), file=saved, flush=True)
            if options.cuda and not options.json:  # a lent machine may go before the table comes
                print(" | ".join(row(work.summary(), work.bar)), flush=True)
            if options.json:
                print(json.dumps(work.summary()), flush=True)
            else:
                rows.append(row(work.summary(), work.bar))

        measure(machine, chosen, options, finished)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except (Failed, OSError, subprocess.CalledProcessError) as failure:
        print(f"bench.py: error: {failure}", file=sys.stderr)
        code = 1
    if len(rows) > 1:
        show(rows)
        for work in chosen:
            if work.note and work.figures:
                print(f"{work.key}: {work.note}")
    if any(work.note and not work.figures for work in chosen):  # babygpt itself failed
        code = code or 1
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(1)
