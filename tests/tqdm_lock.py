"""Gives each fork a lock of its own for tqdm, when it is imported.

All forks share the semaphore in tqdm's: one that is killed with it stops the others.
"""

import os
import threading

from tqdm import tqdm

os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
