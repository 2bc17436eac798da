"""Functions in processes of their own, which have torch and transformers from their birth.

A server imports the two once and is forked for each process: none has any state of the tests'.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

_IMPORTED = [
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]


def new_processes(count=1):
    """Return a pool of processes; they have the server's environment, not that of a test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return ProcessPoolExecutor(count, mp_context=context)
