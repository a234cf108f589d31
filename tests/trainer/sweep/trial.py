"""A trial that does what a test says, in the trainer's place in a sweep's source/.

It starts in a moment, and keeps to what a driver sees of a run: its lock, the rows of its epochs,
result.json, its exit code.

`script.json` in the current directory: what each start does, by the trial's number; the last one
again and again. "ok" completes; "exit N LINE" says the line and exits; "signal N" is a process that
somebody kills; "epochs N SECONDS" takes its time, and is saved at each epoch's end.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

given = dict(word.split("=", 1) for word in sys.argv[1:])
number = given["name"].strip("'")
run = Path(given["platform.runs"].strip('"')) / number
# Read by name, as the trainer's own: a run has one process at a time.
lock = (run / ".lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

with Path("starts").open("a") as starts:
    starts.write(f"{number}\n")
count = Path("starts").read_text().split().count(number)
script = json.loads(Path("script.json").read_text())
steps = script.get(str(int(number)), script.get("all", ["ok"]))
step, *rest = steps[min(count, len(steps)) - 1].split(" ", 2)

stopped: list[int] = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
# As a child of `sessions` does, once it can answer.
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
epochs, seconds = 1, 0.0
if step == "epochs":
    epochs, seconds = int(rest[0]), float(rest[1])
if step == "exit":
    print(*rest[1:])
    sys.exit(int(rest[0]))
if step == "signal":
    os.kill(os.getpid(), int(rest[0]))

rows = run / "metrics.jsonl"
done = len(rows.read_bytes().splitlines()) if rows.exists() else 0
top1 = 1 / (2 + int(number))
for epoch in range(done + 1, epochs + 1):
    time.sleep(seconds)
    if stopped:
        print("stopped by SIGTERM; everything is saved: start the same command again to continue")
        sys.exit(75)
    with rows.open("a") as file:
        file.write(json.dumps({"epoch": epoch, "valid_loss": 1.0, "valid_top1": top1}) + "\n")
result = {"best_epoch": 1, "split": "test", "top1": top1, "pictures": 9}
(run / "model.tar.gz").touch()
digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
(run / "result.json").write_text(json.dumps(result | {"sha256": digest}))
