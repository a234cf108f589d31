"""Threads beside PyTorch's own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_one_at_a_time = threading.Lock()


def work_alone() -> None:
    """Have PyTorch use this thread alone for what it is asked to do here.

    What loads and copies beside the training has threads enough: those that each of them would
    start are in their way.
    PyTorch keeps the number for each thread, but what is set last is where a new one begins: so
    another thread, which ends at once, sets it back.
    """
    with _one_at_a_time:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(usual,))
        restore.start()
        restore.join()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have PyTorch use one thread for what is asked here, and in threads that begin meanwhile.

    For work that threads of our own share out. PyTorch's meet after each operation, and wait whole
    turns of the scheduler for each other where another process wants the processor too: a probe of
    222 images of width 1280 in 37 classes took 2.5 CPU s with one, 45 with two.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
