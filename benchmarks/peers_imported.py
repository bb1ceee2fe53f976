"""Imports the libraries that take seconds to import, once for all processes of `benchmarks.peers`."""

from contextlib import suppress

from benchmarks.peers import missing

if missing("trl") is None:
    with suppress(Exception):  # of a part of it; who calls that is told why
        import trl.experimental.gkd  # noqa: F401
if missing("liger-kernel") is None:
    with suppress(Exception):
        import liger_kernel.chunked_loss  # noqa: F401
