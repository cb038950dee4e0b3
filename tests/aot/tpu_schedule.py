"""Prints the static schedule of the TPU kernels: their instruction bundles, and what fills them.

    pip install -e '.[tpu,test]' && JAX_PLATFORMS=cpu python tests/aot/tpu_schedule.py

It is code, not time: what a core issues for one block of pages, to hold against the bytes of the
block. Nothing is run. benchmarks.md has the table.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
CASES = {
    "decode, pages of 16": {"M": 512, "classes": ((512, 1, 64),)},
    "decode, pages of 64": {"M": 128, "P": 64, "classes": ((512, 1, 16),)},
    "chunks of 32 queries": {"T": 512, "M": 512, "classes": ((128, 32, 64),)},
    "page_write": {},
}


def compile_one(chip, case):
    from test_tpu import attention_arguments, compiled, pool_of, shaped

    from kvjax.pallas_kernels.page_attention import page_attention
    from kvjax.pallas_kernels.page_write import page_write

    if case != "page_write":
        q, pool, layer, work, _ = attention_arguments(**CASES[case])
        attend = functools.partial(page_attention, implementation="tpu")
        compiled(chip, attend, (q, pool, layer, work))
        return
    pool, new, slots = pool_of(), shaped(64, 8, 128, dtype=pool_of().k.dtype), shaped(1, 64)
    write = functools.partial(page_write, implementation="tpu")
    compiled(chip, write, (pool.k, pool.v, shaped(), new, new, slots, slots))


def pieces_of(folder):
    """The kernel's code between jumps: how often each unit is used, and how many copies start."""
    (code,) = folder.glob("*page_*_tpu*[0-9]-final_bundles.txt")
    (use,) = folder.glob("*page_*_tpu*[0-9]-final_hlo-static-per-bundle-utilization.txt")
    head, _, rows = use.read_text().partition("== UTILIZATION:\n")
    names, capacity = head.splitlines()[1].split(", "), head.splitlines()[2].split()
    rows = [list(map(int, row.split())) for row in rows.splitlines() if row.strip()]
    starts, copies = [0], {}
    for line in code.read_text().splitlines():
        match = re.match(r"\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?:?[\s:>]*\{", line)
        if match is None:
            continue
        number = int(match[1], 16)
        if match[2]:
            starts.append(number)
        if "sbr.rel" in line:
            starts.append(number + 1)
        copies[number] = len(re.findall(r"= dma\.hbm_to_vmem", line))
    starts = sorted({start for start in starts if start < len(rows)})
    for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        sums = [sum(column) for column in zip(*rows[begin:end], strict=True)]
        used = {n: (s, int(c)) for n, s, c in zip(names, sums, capacity, strict=True)}
        yield end - begin, used, sum(copies.get(i, 0) for i in range(begin, end))


def report(chip, case, folder):
    pieces = list(pieces_of(folder))
    total = sum(bundles for bundles, _, _ in pieces)
    weight = "MXU" if case != "page_write" else "VSTORE"
    bundles, used, _ = max(pieces, key=lambda piece: piece[1][weight][0])
    shares = "  ".join(f"{u} {100 * used[u][0] / used[u][1] / bundles:3.0f}" for u in UNITS)
    fetch, _, copies = max(pieces, key=lambda piece: piece[2])
    each = f"{fetch / copies:5.1f}" if case != "page_write" else "    -"
    print(f"{chip:6}{case:22}{total:6}{bundles:6}  {shares}   {each}", flush=True)


def main():
    if len(sys.argv) == 3:
        compile_one(*sys.argv[1:])
        return
    print("chip  case                   total  body  percent of each unit's slots, in the body"
          "                     bundles a copy")  # fmt: skip
    for case in CASES:
        for chip in CHIPS:
            with tempfile.TemporaryDirectory() as folder:
                # libtpu reads its options once a process.
                options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
                environment = os.environ | {"LIBTPU_INIT_ARGS": options}
                command = [sys.executable, __file__, chip, case]
                subprocess.run(command, env=environment, check=True, capture_output=True)
                report(chip, case, Path(folder))


if __name__ == "__main__":
    main()
