"""What a call costs before any arithmetic: narrowgauge beside torch's F.linear at a shape that is nearly nothing.

    python bench/overhead.py [--json] [--rows M] [--size N]

x [M, N], w [N, N], float32, inference mode, one thread. All paths are timed in turn, round after round, so that a busy
machine touches them alike; the table gives the median and the 10th percentile over rounds. The arithmetic, the same
in every narrowgauge row, is included; goals: native <= 300 ns and narrowgauge.linear <= 1000 ns beyond it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import timeit
from collections.abc import Callable

import narrowgauge as ng
import torch
from narrowgauge import _native

ROUNDS = 60
CALLS = 500


def paths(rows: int, size: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    w, x, bias = torch.randn(size, size), torch.randn(rows, size), torch.randn(size)
    q = ng.quantize(w, ng.fp6).pack()
    matrix, out, format = q._matrix, torch.empty(rows, size), str(q.format)
    assert matrix is not None
    narrow, plain = ng.nn.Linear(q), torch.nn.Linear(size, size, bias=False)
    native, linear, op, reference = _native.linear, ng.linear, ng.ops.linear, torch.nn.functional.linear
    linear(x, q)
    return {
        "nothing": lambda: None,
        "_native.isa(), an empty native call": _native.isa,
        "_native.linear into a given tensor": lambda: native(x, matrix, None, out),
        "_native.linear": lambda: native(x, matrix, None),
        "narrowgauge.linear": lambda: linear(x, q),
        "narrowgauge.linear with bias": lambda: linear(x, q, bias),
        "narrowgauge.nn.Linear": lambda: narrow(x),
        "torch.ops.narrowgauge.linear": lambda: op(x, q.packed, None, format, size, size),
        "torch F.linear": lambda: reference(x, w),
        "torch F.linear with bias": lambda: reference(x, w, bias),
        "torch nn.Linear": lambda: plain(x),
    }


def measure(rows: int, size: int) -> list[dict[str, object]]:
    calls = paths(rows, size)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e9)
    empty = statistics.median(times.pop("nothing"))
    reference = statistics.median(times["torch F.linear"]) - empty
    rows_out: list[dict[str, object]] = []
    for name, each in times.items():
        median, low = statistics.median(each) - empty, statistics.quantiles(each, n=10)[0] - empty
        ratio = median / reference
        rows_out.append({"path": name, "median_ns": median, "p10_ns": low, "ratio_to_torch_f_linear": ratio})
    return rows_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=1, help="rows of x")
    parser.add_argument("--size", type=int, default=16, help="rows and columns of w")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.rows, options.size)
    machine = {
        "cpu": _native.cpu_name(),
        "isa": _native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": options.rows,
        "size": options.size,
    }
    if options.json:
        print(json.dumps({"machine": machine, "paths": result}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'path':38}{'median ns':>11}{'p10 ns':>9}{'/ F.linear':>12}")
    for row in result:
        ratio = row["ratio_to_torch_f_linear"]
        print(f"{row['path']:38}{row['median_ns']:11.0f}{row['p10_ns']:9.0f}{ratio:12.2f}")


if __name__ == "__main__":
    main()
