"""What measures: `kdkernels bench`, and the harness below it and `python -m benchmarks`.

Points and their inputs are in `workloads`, who takes part in `contestants`, the measuring in `measure`, what
is said of it in `charts` and `pages`; language models in `e2e`. Below are timing in interleaved rounds,
ceilings, memory, reports.

Needs nothing but torch; rich, where it is installed, draws the progress bars and the tables.
"""

from .isolated import ProcessDied, run_isolated
from .memory import Peak, page_faults, peak_growth, raise_malloc_thresholds
from .report import Progress, environment, markdown_table, print_table, write_json
from .roofline import copy, gigabytes_per_second, input_sets, tensor_bytes, traffic_bytes, triad
from .timing import Contestant, Neighbours, Timing, clock_for, race

__all__ = [
    "Contestant",
    "Neighbours",
    "Peak",
    "ProcessDied",
    "Progress",
    "Timing",
    "clock_for",
    "copy",
    "environment",
    "gigabytes_per_second",
    "input_sets",
    "markdown_table",
    "page_faults",
    "peak_growth",
    "print_table",
    "race",
    "raise_malloc_thresholds",
    "run_isolated",
    "tensor_bytes",
    "traffic_bytes",
    "triad",
    "write_json",
]
