"""One of several processes, which ends while threads of it are in PyTorch's C++."""

import threading
import time

from trainer.common.errors import OK
from trainer.distributed.job import Job
from trainer.distributed.world import current_world


def look(store) -> None:
    while True:
        store.check(["never"])


world = current_world()
assert isinstance(world, Job)
world._meet(600)
for _ in range(4):
    threading.Thread(target=look, args=(world._store.clone(),), daemon=True).start()
world._configured = True  # else rank 0 would tell the others that there is nothing to train
world._store.set(f"here/{world.rank}", "")
world._store.wait(["here/0", "here/1"])  # rank 0 is the host of what the others look at
time.sleep(0.5)
world.leave(OK)
