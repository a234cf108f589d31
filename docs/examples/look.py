"""Label a folder, and set aside what a person should look at.

python look.py MODEL FOLDER
"""

import csv
import sys
from pathlib import Path

import packhorse

model = packhorse.Model.load(sys.argv[1])  # a model.tar.gz or a run's directory
endings = {".jpg", ".jpeg", ".png", ".webp"}
pictures = sorted(path for path in Path(sys.argv[2]).rglob("*.*") if path.suffix.lower() in endings)
answers = list(zip(pictures, model.predict(pictures), strict=True))

# The least sure first; `unlike` is what resembles nothing that the model was trained on.
answers.sort(key=lambda answer: (not answer[1].unlike, answer[1].probability))
with Path("look.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["path", "label", "probability", "rather"])
    for path, said in answers:
        if not said.sure:
            table.writerow([path, said.label, f"{said.probability:.3f}", said.labels[1]])
sure = sum(bool(said.sure) for _, said in answers)
print(f"{sure} of {len(answers)} are sure; the others are in look.csv, the strangest first")
