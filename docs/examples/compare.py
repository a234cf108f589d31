"""Train three times, with one setting changed, and say which is best.

python compare.py FOLDER
"""

import sys

import packhorse

runs = {
    rate: packhorse.fit(sys.argv[1], name=f"rate-{rate}", train={"epochs": 8}, optim={"lr": rate})
    for rate in (1e-4, 1e-3, 1e-2)
}
# By valid: the test's figure of what was chosen by the test would flatter.
scores = {
    rate: max(row["valid_top1"] for row in run.history if "valid_top1" in row)
    for rate, run in runs.items()
}
best = max(scores, key=lambda rate: scores[rate])
for rate, score in scores.items():
    print(f"learning rate {rate:g}: valid {score:.1%}{'  <- best' if rate == best else ''}")
print(f"test {runs[best].metrics['top1']:.1%}; the model is {runs[best].package}")
