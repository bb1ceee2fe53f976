"""A function in a process of its own: for settings that can't be undone, and memory nobody has touched."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

_lock = threading.Lock()


class ProcessDied(RuntimeError):
    """The process ended without a result: it raised, it was killed, or it was stuck."""


def run_isolated(
    function: Callable[..., Any],
    *args: Any,
    on_message: Callable[[Any], None] | None = None,
    preload: Sequence[str] = (),
    patience: float | None = None,
) -> Any:
    """Runs `function(send, *args)` in a fresh process and returns its result.

    Where the system has it, processes are forked from a server that has imported `preload` and done nothing
    else, so that one costs milliseconds and not an import of torch; it has no thread, no warm memory and no
    setting of ours.

    Args:
        function: A function at the top level of a module. Its first argument, `send(message)`, calls
            `on_message` in the calling process.
        *args: Its other arguments.
        on_message: Receives what the function sends, in the calling thread.
        preload: Modules that the server imports; only the first call's count, or those of `start`.
        patience: Seconds that the function may go without a message before it counts as stuck and is ended;
            None waits for ever.

    Returns:
        What the function returned.

    Raises:
        ProcessDied: With the traceback of the process, the signal that killed it, or how long it said
            nothing.
    """
    with _lock:
        if "forkserver" in multiprocessing.get_all_start_methods():
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([*preload])
        else:
            context = multiprocessing.get_context("spawn")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sending, function, args))
        sys.stdout.flush()
        process.start()
        sending.close()
    try:
        while True:
            if patience is not None and not receiving.poll(patience):
                raise ProcessDied(f"{function.__name__} said nothing for {patience:.0f} s and was ended")
            try:
                kind, value = receiving.recv()
            except EOFError:
                process.join()
                raise ProcessDied(f"{function.__name__} ended with exit code {process.exitcode}") from None
            if kind == "message":
                if on_message is not None:
                    on_message(value)
            elif kind == "result":
                process.join()
                return value
            else:
                process.join()
                raise ProcessDied(f"{function.__name__} failed:\n{value}")
    finally:
        receiving.close()
        if process.is_alive():
            process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)


def start(preload: Sequence[str]) -> None:
    """Has the server of processes import what several users of it need, each of which names its own."""
    run_isolated(_nothing, preload=preload)


def _nothing(send: Callable[[Any], None]) -> None:
    pass


def _child(sending: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        result = function(lambda message: sending.send(("message", message)), *args)
    except BaseException:
        sending.send(("error", traceback.format_exc()))
    else:
        sending.send(("result", result))
    finally:
        sending.close()
