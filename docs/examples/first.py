"""Train on a folder of pictures, look at the result, and ask the model.

python first.py FOLDER
"""

import sys
from pathlib import Path

import packhorse

folder = Path(sys.argv[1])  # train/CLASS/*.jpg, and valid/ and test/ like it

# Ctrl-C saves; the same call goes on, and returns at once where the run is complete.
run = packhorse.fit(folder, name="first", train={"epochs": 8})
print(f"accuracy {run.metrics['top1']:.1%}, macro F1 {run.metrics['f1']:.1%}; look at {run.report}")

for row in run.history:
    if "train_loss" in row:
        print(f"epoch {row['epoch']}: train {row['train_loss']:.3f}, valid {row['valid_loss']:.3f}")

pictures = sorted((folder / "test").rglob("*.*"))[:5]
for picture, said in zip(pictures, run.model.predict(pictures), strict=True):
    note = "" if said.sure else f"  (not sure: {', '.join(said.members or said.labels[:3])})"
    print(f"{picture.name}: {said.label}, {said.probability:.0%}{note}")
