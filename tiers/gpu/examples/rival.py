#!/usr/bin/env python3
"""What PyTorch makes of the same copies as gpu_bench: pages that lie apart on the GPU to and from pinned memory.

Up: one copy into a buffer on the GPU, then `index_copy_` to the pages. Down: `index_select`, then one copy. Across:
`index_select` alone. Each beside one large pinned copy; the median of seven runs. `--json FILE` writes it down.
Without torch or without CUDA it says so and is content.
"""

import argparse
import json
import statistics
import sys
import time

PAGES = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20]
RUNS = 7


def measured(torch, work):
    """Seconds of `work`, the median; the first run finds everything cold."""
    times = []
    for run in range(RUNS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if run:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--bytes", type=int, default=256 << 20, help="how much one run copies")
    arguments.add_argument("--json", help="where the figures go")
    given = arguments.parse_args()
    try:
        import torch
    except ImportError as error:
        print(f"no rival: {error}")
        return
    if not torch.cuda.is_available():
        print(f"no rival: torch {torch.__version__} has no CUDA here")
        return

    size = given.bytes
    host = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(size, dtype=torch.uint8, device="cuda")
    between = torch.zeros(size, dtype=torch.uint8, device="cuda")
    large = {
        "up": measured(torch, lambda: between.copy_(host, non_blocking=True)),
        "down": measured(torch, lambda: host.copy_(between, non_blocking=True)),
        "across": measured(torch, lambda: between.copy_(device, non_blocking=True)),
    }
    figures = {"about": {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(0), "bytes": size}}
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name(0)}: GB/s, and the ratio to one large copy")
    for page in PAGES:
        count = size // page
        order = torch.randperm(count, device="cuda")
        pages, gathered = device.view(count, page), between.view(count, page)

        def up():
            between.copy_(host, non_blocking=True)
            pages.index_copy_(0, order, gathered)

        def down():
            torch.index_select(pages, 0, order, out=gathered)
            host.copy_(between, non_blocking=True)

        def across():
            torch.index_select(pages, 0, order, out=gathered)

        line = f"{page >> 10:7d}Ki"
        for name, work in (("up", up), ("down", down), ("across", across)):
            took = measured(torch, work)
            figures.setdefault(name, []).append(
                {"page": page, "gb_per_s": round(size / took / 1e9, 3), "ratio": round(large[name] / took, 3)}
            )
            line += f"  {name} {size / took / 1e9:7.1f} {large[name] / took:6.3f}"
        print(line)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
