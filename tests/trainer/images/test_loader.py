import threading

import numpy as np
import torch

from trainer.images.loader import load


def test_threads_that_load_start_no_others_and_leave_everybody_else_theirs():
    """PyTorch shares out what is large; but cores are busy with the other threads that load."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen, later = set(), []

    def view(sample):
        seen.add(torch.get_num_threads())
        return np.zeros((4, 4, 3), np.uint8)

    try:
        for _ in load(view, np.zeros(8, np.int64), [np.arange(8)], 4, workers=2):
            pass
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert (seen, torch.get_num_threads(), later) == ({1}, 3, [3])
    finally:
        torch.set_num_threads(before)
