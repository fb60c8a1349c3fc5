#!/usr/bin/env python3
"""Where the time of a training step on a GPU goes, kernel by kernel: runs `babygpt bench train --backend cuda` under Nsight Compute (ncu).

    kernels.py BABYGPT [options of bench train]      kernels.py build/cuda/babygpt --batch 512 --precision bf16

A line for each kernel of one step: how often it runs, microseconds in all, its share of the step, the bytes that it moved to and from the GPU's
memory, in TB/s, and as a share of what the memory could. Kernels run one by one here, each with cold caches, so that a step may take less than
their sum.
"""
import csv
import re
import shutil
import subprocess
import sys

TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
MEMORY = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
METRICS = (TIME, READ, WRITTEN, MEMORY)
LAST = "adamw"  # the kernel that ends a step
SKIPPED, LAUNCHES = "3000", "700"  # plans of products are tried first; then come at least two whole steps
UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1, "us": 1, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6,
         "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 1, "": 1}


def short(name):
    """A kernel's name without namespaces and arguments; of a library's, what tells it from others."""
    name = re.sub(r"\(.*", "", re.sub(r"^void ", "", name))
    name = re.sub(r"babygpt::|cuda::|\(anonymous namespace\)::|cutlass::|__nv_", "", name)
    return name if len(name) <= 72 else name[:69] + "..."


def measured(command):
    """The kernels of one whole step, in order: dictionaries of metrics."""
    ncu = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "--launch-skip", SKIPPED, "--launch-count", LAUNCHES,
           "--kill", "yes", "--metrics", ",".join(METRICS)]
    done = subprocess.run(ncu + command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        sys.exit(f"kernels.py: ncu gave no table: {(done.stdout + done.stderr).strip()[-500:]}")
    rows = list(csv.reader(lines[start:]))
    names, units = rows[0], dict(zip(rows[0], rows[1]))
    kernels = []
    for cells in rows[2:]:
        if len(cells) != len(names):
            continue
        kernel = dict(zip(names, cells))
        kernel.update({metric: float(kernel[metric].replace(",", "") or 0) * UNITS[units[metric]]
                       for metric in METRICS})
        kernels.append(kernel)
    ends = [i for i, kernel in enumerate(kernels) if LAST in kernel["Kernel Name"]]
    if len(ends) < 2:
        sys.exit(f"kernels.py: among {len(kernels)} kernels there is no whole step")
    return kernels[ends[-2] + 1: ends[-1] + 1]


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    if not shutil.which("ncu"):
        print("skipped: ncu (Nsight Compute), which times each kernel, is not here")
        return
    step = measured([sys.argv[1], "bench", "train", "--backend", "cuda", "--seconds", "2", *sys.argv[2:]])
    table = {}
    for kernel in step:
        line = table.setdefault(short(kernel["Kernel Name"]), [0, 0.0, 0.0, 0.0])
        microseconds = kernel[TIME]
        for i, value in enumerate((1, microseconds, kernel[READ] + kernel[WRITTEN], microseconds * kernel[MEMORY])):
            line[i] += value
    total = sum(line[1] for line in table.values())
    print(f"{'kernel':<72} {'times':>5} {'us':>9} {'share':>6} {'MB':>8} {'TB/s':>6} {'memory':>7}")
    for name, (times, us, moved, memory) in sorted(table.items(), key=lambda item: -item[1][1]):
        print(f"{name:<72} {times:>5} {us:>9.1f} {us / total:>6.1%} {moved / 1e6:>8.1f} {moved / us / 1e6:>6.2f} {memory / us:>6.1f}%")
    print(f"{'all':<72} {len(step):>5} {total:>9.1f}")


main()
