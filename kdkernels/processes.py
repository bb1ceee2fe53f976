"""What a process of several has to do before it ends."""

from __future__ import annotations

import atexit
import functools
import time

# For threads that have nothing else to do than to take the interpreter's lock once.
_PAUSE = 0.1


@functools.cache
def pause_at_exit() -> None:
    """Lets threads of torch.distributed finish before the interpreter ends, once and for all.

    Gloo's hold the tensors of the last collective until they get the interpreter's lock, which the main
    thread may keep for 5 ms. Where that one ends before, torch aborts, and the exit status says so though all
    was done (pytorch/pytorch#179291); a destroyed group has such threads, too, while somebody holds it.
    """
    atexit.register(time.sleep, _PAUSE)
