"""Threads beside PyTorch's own."""

import threading

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
