"""Peak memory of one variant in a separate process: ``python -m ttd_plugins.benchmark.memory`` with options as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ttd_plugins.benchmark.step_variants import Bench, BenchOptions
from ttd_plugins.errors import TTDError, one_sentence

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_memory(options: BenchOptions, variant: str) -> dict[str, int] | None:
    """Measure the memory of one call of a variant in a new process, after model, gradients and optimizer state exist.

    Returns:
        ``"resident"``: bytes before the call; ``"peak"``: additional peak bytes during the call. ``None`` if the
        operating system does not report them (on a CPU, other systems than Linux).

    Raises:
        TTDError: the process failed.
    """
    given = json.dumps({"options": asdict(options), "variant": variant})
    done = subprocess.run(
        [sys.executable, "-m", "ttd_plugins.benchmark.memory", given], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TTDError(f"the process that measures the memory of {variant!r} ended with {done.returncode}: {last[0]}")
    found: dict[str, int] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(bench: Bench, variant: str) -> dict[str, int] | None:
    """Measure in this process, which should be new unless the device is a GPU; see :func:`peak_memory`."""
    import torch

    bench.call(variant, keep_gradients=True)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        bench.call(variant, keep_gradients=True)
        torch.cuda.synchronize()
        return {"resident": resident, "peak": torch.cuda.max_memory_allocated() - resident}
    if bench.device.type != "cpu" or not CLEAR_REFS.exists():
        return None
    trim_memory()
    try:
        # Resets the peak resident size to the current one.
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    resident = _kibibytes("VmRSS")
    bench.call(variant, keep_gradients=True)
    return {"resident": resident * 1024, "peak": (_kibibytes("VmHWM") - resident) * 1024}


def trim_memory() -> None:
    """Return freed memory to the system if the C library can, so that it does not count as used."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _kibibytes(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Print the result as the last line."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    try:
        found = measure(Bench(BenchOptions(**given["options"])), given["variant"])
    except TTDError as error:
        sys.exit(one_sentence(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
