#!/usr/bin/env python3
"""tools/bench cannot rot: the ceilings are measured, the smallest works run one turn without peers, bars are judged as they are meant, and
what the bench believes about the baby (FLOPs, bytes) is what babygpt says. A few seconds. BABYGPT=build/babygpt python3 tests/test_bench.py
"""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BABYGPT = os.path.abspath(os.environ.get("BABYGPT", "build/babygpt"))
CEILINGS = os.path.join(os.path.dirname(BABYGPT), "ceilings")
BENCH = os.path.join(ROOT, "tools", "bench", "bench.py")
spec = importlib.util.spec_from_file_location("bench", BENCH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
passed = failed = 0


def check(what, good):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("FAILED:", what)


def run(*command, **how):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=100, **how)


def lines(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_ceilings():
    result = run(CEILINGS, "--json", "--seconds", "0.001", "--threads", "1,2")
    check("ceilings ends well: " + result.stderr, result.returncode == 0)
    found = lines(result)
    check("each ceiling for one thread and for two", all(a["title"] == b["title"] and (a["threads"], b["threads"]) == (1, 2)
                                                         for a, b in zip(found[::2], found[1::2])))
    check("five working sets are read", sum(c["ceiling"] == "read" for c in found) == 10)
    check("reading takes time, and not too much of it", all(0.01 < c["best"] < 1e5 for c in found if c["ceiling"] == "read"))
    check("the middle is no more than the best", all(c["best"] is None or 0 < c["middle"] <= c["best"] for c in found))
    best = {"fma128": 0, "fma256": 0}

    def twice_as_wide():  # as processors are made, as fast or twice as fast; on a busy machine, in the best of several tries
        for c in lines(run(CEILINGS, "--json", "--seconds", "0.001", "--only", ",".join(best), "--threads", "1")):
            best[c["ceiling"]] = max(best[c["ceiling"]], c["best"])
        return 0.7 < best["fma256"] / best["fma128"] < 3
    if any(c["ceiling"] == "fma256" and c["best"] is not None for c in found):
        check("FMA of 256 bit against 128", any(twice_as_wide() for _ in range(50)))
    result = run(CEILINGS, "--json", "--seconds", "0.001", "--only", "read", "--bytes", "1000000", "--threads", "1")
    check("one working set", [c["bytes"] for c in lines(result)] == [1000000])
    for words in (["--threads", "0"], ["--seconds", "none"], ["--what"], ["--bytes", "7"]):
        check(f"ceilings refuses {words}", run(CEILINGS, *words).returncode == 2)


def check_compilers(folder):
    for compiler in ("g++", "clang++"):
        if shutil.which(compiler):
            build = os.path.join(folder, compiler)
            result = run("make", "-s", f"CXX={compiler}", "CXXFLAGS=-Werror", f"build={build}", f"{build}/ceilings", cwd=ROOT)
            check(f"{compiler} has nothing to warn of: {result.stderr}", result.returncode == 0)


def check_bars():
    bar = bench.Bar(1.35, 0.75, floor=1.1)
    for ratio, share, held in ((1.4, 0.5, True), (1.2, 0.8, True), (1.2, 0.7, False), (1.0, 0.9, False), (None, 0.8, None), (None, 0.7, None),
                               (1.2, None, None), (1.4, None, True), (1.0, None, False)):
        check(f"the lower of 1.35 and 75 %, never below 1.1: {ratio} and {share}", bar.held(1, ratio, share) is held)
    check("at most", bench.Bar(most=30).held(29, None, None) is True and bench.Bar(most=30).held(31, None, None) is False)
    check("a share alone", bench.Bar(share=0.6).held(1, None, 0.6) is True and bench.Bar(share=0.6).held(1, None, 0.59) is False)
    check("a ratio without a peer", bench.Bar(1.5).held(1, None, None) is None)
    work = bench.Work("a", "b", ours=lambda m: 30.0, unit="ms", peer=lambda m, name: 60.0, peers=["c"], less=True, bar=bench.Bar(1.5))
    work.turn(None, lambda name: None)
    check("less is better", work.summary()["ratio"]["median"] == 2 and work.summary()["held"] is True)

    def broken(machine, name):
        if name == "c":
            raise bench.Failed("no")
        return 10.0
    work = bench.Work("a", "b", ours=lambda m: 30.0, peer=broken, peers=["c", "d"], bound=lambda m: 40, bar=bench.Bar(2, 0.8))
    work.turn(None, lambda name: None)
    summary = work.summary()
    check("the next best peer", summary["peer_name"] == "d" and summary["ratio"]["median"] == 3 and summary["share"]["median"] == 0.75)
    check("both conditions are shown", "2 \u00d7 \u2713 or 80 % \u2717" in bench.row(summary, work.bar) and "held" in bench.row(summary, work.bar))


def check_model():
    for vocab, context in ((96, 192), (50257, 192), (96, 3072)):
        info = lines(run(BABYGPT, "info", "--preset", "baby", "--vocab", vocab, "--context", context, "--json"))[0]
        check("FLOPs of a token", info["flops_per_token"] == bench.forward_flops(vocab, context))
        check("bytes of a token", info["parameters"] * 4 - context * 384 * 4 == bench.weight_bytes(vocab, 4))
    check("so many different characters", len(set(bench.characters(50255))) == 50255)


def check_bench(folder):
    common = [sys.executable, BENCH, "--babygpt", BABYGPT, "--ceilings", CEILINGS, "--folder", folder, "--peers", folder, "--seconds", "0.01"]
    keys = ["decode-96-int8", "start"]
    result = run(*common, "--pairs", "1", "--json", *keys)
    check("the bench ends well: " + result.stderr, result.returncode == 0)
    found = {line["work"]: line for line in lines(result) if "work" in line}
    check("each work that was asked for, no other", sorted(found) == keys)
    check("figures", all(work["ours"]["median"] > 0 for work in found.values()))
    check("no peer", all(work["peer"] is None for work in found.values()) and "left out" in result.stderr)
    check("a share", 0 < found["decode-96-int8"]["share"]["median"] < 2)
    check("no such work", run(*common, "strat").returncode == 2)
    check("no such program", run(*common, "--babygpt", folder, "idle").returncode == 1)
    if os.name == "posix":
        child = subprocess.Popen([*common, "--seconds", "60", "--pairs", "1", "idle", "growth-192-384"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # it may be ignored here
        for line in child.stderr:
            if "growth-192-384: babygpt" in line:
                break
        time.sleep(0.2)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal's Ctrl-C
        output, errors = child.communicate(timeout=90)
        check("Ctrl-C ends it: " + errors, child.returncode == 130 and "Traceback" not in errors)
        check("a table of what there is", "CPU time between two tokens" in output and "\u2264 0.5" in output)


def check_cuda(folder):
    """The works of a GPU, with a babygpt that only says that it is fast."""
    fake, saved = os.path.join(folder, "fake"), os.path.join(folder, "saved")
    with open(fake, "w", encoding="utf-8") as file:
        file.write('#!/bin/sh\necho \'{"tokens_per_second": 5e6, "ms": 3, "device_bytes": 1073741824}\'\n')
    os.chmod(fake, 0o755)
    common = [sys.executable, BENCH, "--cuda", "--folder", folder, "--peers", "none", "--pairs", "1"]
    result = run(*common, "--babygpt", fake, "--save", saved)
    check("the works of a GPU end well: " + result.stderr, result.returncode == 0)
    with open(saved, encoding="utf-8") as file:
        found = {work["work"]: work for work in map(json.loads, file) if "work" in work}
    check("a figure of each", len(found) > 6 and all(work["turns"] == 1 for work in found.values()))
    check("each is said as soon as it is there", result.stdout.count("training bf16, B=512, V=96") == 2)
    check("memory in GiB", found["cuda-memory-64"]["ours"]["median"] == 1 and found["cuda-memory-64"]["held"] is True)
    share = found["cuda-512"]["share"]["median"]
    check("a share of what the tensor cores can do", abs(share - 5e6 * 3 * bench.forward_flops(96) / 790e12) < 1e-9)
    result = run(*common, "--babygpt", BABYGPT)
    check("no GPU: " + result.stderr, result.returncode == 0 and result.stdout.startswith("skipped: ") and "CUDA" in result.stdout)


def check_kernels(folder):
    """The table of a step's kernels, from what ncu would say."""
    names = ["ID", "Kernel Name", "dram__bytes_read.sum", "dram__bytes_write.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
             "gpu__time_duration.sum"]
    one = [["void babygpt::cuda::twice<float>(T1 *, int)", "3,000,000", "1,000,000", "40", "2,000"]] * 2 + \
          [["void babygpt::cuda::adamw<__nv_bfloat16>(float *)", "6,000,000", "0", "50", "3,000"]]
    table = ["==PROF== Connected", names, ["", "", "byte", "byte", "%", "ns"], *[[str(i), *cells] for i, cells in enumerate(one[1:] + one)]]
    tools = os.path.join(folder, "tools")
    os.mkdir(tools)
    with open(os.path.join(tools, "table"), "w", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else ",".join(f'"{cell}"' for cell in line)) + "\n" for line in table)
    with open(os.path.join(tools, "ncu"), "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\ncat "{tools}/table"\n')
    os.chmod(os.path.join(tools, "ncu"), 0o755)
    kernels = [sys.executable, os.path.join(ROOT, "tools", "bench", "kernels.py"), BABYGPT]
    result = run(*kernels, env={**os.environ, "PATH": tools + os.pathsep + os.environ["PATH"]})
    found = [line.split() for line in result.stdout.splitlines()]
    check("the kernels of one step: " + result.stderr, result.returncode == 0 and [words[0] for words in found[1:]] == ["twice<float>", "adamw<bfloat16>", "all"])
    check("how often, how long, and its share", found[1][1:4] == ["2", "4.0", "57.1%"] and found[3][1:] == ["3", "7.0"])
    check("bytes, and how fast", found[1][4:] == ["8.0", "2.00", "40.0%"])
    result = run(*kernels, env={**os.environ, "PATH": folder})
    check("no ncu", result.returncode == 0 and result.stdout.startswith("skipped: "))


check_ceilings()
check_bars()
check_model()
with tempfile.TemporaryDirectory() as where:
    check_compilers(where)
    check_bench(where)
    if os.name == "posix":
        check_cuda(where)
        check_kernels(where)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
