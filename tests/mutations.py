"""`make mutations`: each fault that a hand slips into is noticed by a test of `make test`.

Each is put into a copy of the code, and the test that is named must fail there; in the code as it
is, it passes. ARGS="WORD" tries those whose fault holds the word.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# As tests/conftest.py and trainer/distributed/job.py have it: PyTorch reads it when it is loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
FORKS = multiprocessing.get_context("fork")
# What is slow to import, and not ours: each test begins as a fork that has it.
IMPORTED = ("torch", "torchvision", "torchmetrics.functional.classification", "onnxruntime")
PROJECT = Path(__file__).parents[1]
COPIED = ("trainer", "serving", "launch", "conf", "tests", "pyproject.toml", "Makefile")


@dataclass(frozen=True)
class Mutation:
    """A fault: in `file`, `old` (which is there once) became `new`; `test`, below tests/, fails."""

    fault: str
    file: str
    old: str
    new: str
    test: str


def wiring(word: str) -> str:
    return f"trainer/settings/test_wiring.py -k {word}"


LOOP, TRAINING = "trainer/training/loop.py", "trainer/training/training.py"
OUTCOME, LOADER = "trainer/results/outcome.py", "trainer/images/loader.py"
OPTIM, CALIBRATE = "trainer/network/optim.py", "trainer/results/calibrate.py"
MUTATIONS = (
    # --- settings to the loop ---
    Mutation(
        "label smoothing dropped in fit",
        TRAINING,
        "smoothing = self.config.train.label_smoothing",
        "smoothing = 0.0",
        wiring("label_smoothing"),
    ),
    Mutation(
        "std passed as mean",
        TRAINING,
        "        mean=model.mean,\n",
        "        mean=model.std,\n",
        wiring("model.mean"),
    ),
    Mutation(
        "mean passed as std",
        TRAINING,
        "        std=model.std,\n",
        "        std=model.mean,\n",
        wiring("model.std"),
    ),
    Mutation(
        "mixup and cutmix swapped",
        TRAINING,
        "Mixing(augment.mixup, augment.cutmix)",
        "Mixing(augment.cutmix, augment.mixup)",
        wiring("mixup"),
    ),
    Mutation(
        "flip and vertical flip swapped",
        TRAINING,
        "vertical_flip=augment.vertical_flip",
        "vertical_flip=bool(augment.flip)",
        wiring("vertical_flip"),
    ),
    Mutation(
        "accumulation dropped",
        LOOP,
        "run.gradients.microbatches(*mixed, config.accumulate)",
        "run.gradients.microbatches(*mixed, 1)",
        wiring("accumulate"),
    ),
    Mutation(
        "the head's rate dropped",
        OPTIM,
        "parameter_groups(network, lr, head_lr or lr, weight_decay, layer_decay)",
        "parameter_groups(network, lr, lr, weight_decay, layer_decay)",
        wiring("head_lr"),
    ),
    Mutation(
        "layer decay dropped between the settings and the optimizer",
        TRAINING,
        "            layer_decay=choice.layer_decay,\n",
        "",
        wiring("layer_decay"),
    ),
    Mutation(
        "the share that saving may cost taken for the minutes between",
        "trainer/training/checkpoints.py",
        "checkpoint.Cadence(config.minutes, config.max_cost)",
        "checkpoint.Cadence(config.minutes, config.minutes)",
        wiring("max_cost"),
    ),
    Mutation(
        "the sampler of equal classes for every run",
        TRAINING,
        'balanced=config.train.imbalance == "sampler"',
        'balanced=config.train.imbalance != "none"',
        wiring("logits"),
    ),
    Mutation(
        "the most that int8 may cost dropped",
        OUTCOME,
        ", max_drop=config.package.max_drop)",
        ")",
        wiring("max_drop"),
    ),
    # --- the step ---
    Mutation(
        "microbatches' gradients not divided by the whole batch",
        LOOP,
        "torch.full_like(loss, 1 / divisor)",
        "torch.full_like(loss, 1 / len(inputs))",
        "trainer/training/test_loop.py -k four_parts",
    ),
    Mutation(
        "gradients clipped before they are unscaled",
        LOOP,
        "        run.scaler.unscale_(run.optimizer)\n        nn.utils",
        "        nn.utils",
        "trainer/training/test_loop.py -k unscaled",
    ),
    Mutation(
        "gradients not clipped",
        LOOP,
        "    if config.clip_norm is not None:\n",
        "    if config.clip_norm is None and config.clip_norm:\n",
        "trainer/training/test_loop.py -k clipping",
    ),
    Mutation(
        "the rate of a step set one step late",
        LOOP,
        "            train_one_step(run, image, target)\n            run.end_step()\n",
        "            run.end_step()\n            train_one_step(run, image, target)\n",
        "trainer/training/test_loop.py -k stop_at_any_batch",
    ),
    Mutation(
        "the rate never set",
        LOOP,
        "            optim.set_lr(run.optimizer, run.lr_factor())\n",
        "",
        wiring("warmup"),
    ),
    Mutation(
        "the prior added where classes count alike",
        TRAINING,
        "return output + self.log_prior",
        "return output - self.log_prior",
        "trainer/training/test_loop.py -k rare_classes",
    ),
    Mutation(
        "dropout the same in each step",
        LOOP,
        'f"{seed}/{step}".encode()',
        'f"{seed}".encode()',
        "trainer/training/test_loop.py -k dropout_differs",
    ),
    # --- optimizer and schedule ---
    Mutation(
        "biases and norms decayed too",
        OPTIM,
        "        if parameter.ndim >= 2\n        and name.endswith",
        "        if name.endswith",
        "trainer/network/test_optim.py -k decay",
    ),
    Mutation(
        "layers decayed from the wrong end",
        OPTIM,
        "{name: last - layer for name, layer in layers.items()}",
        "{name: layer for name, layer in layers.items()}",
        "trainer/network/test_optim.py -k share_of_the_rate",
    ),
    Mutation(
        "cosine that never reaches zero",
        OPTIM,
        "(1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))",
        "(1 + math.cos(math.pi / 2 * (step - warmup) / max(total - warmup, 1)))",
        "trainer/network/test_optim.py -k cosine",
    ),
    # --- order, views, shares ---
    Mutation(
        "the same order in each epoch",
        "trainer/images/sampler.py",
        "    return generator(Purpose.ORDER, seed, epoch).permutation(count)",
        "    return generator(Purpose.ORDER, seed, 0).permutation(count)",
        "trainer/images/test_sampler.py -k order",
    ),
    Mutation(
        "the same order in each epoch, of equal classes",
        "trainer/images/sampler.py",
        "    rng = generator(Purpose.ORDER, seed, epoch)\n    classes",
        "    rng = generator(Purpose.ORDER, seed, 0)\n    classes",
        "trainer/images/test_sampler.py -k seed_and_epoch",
    ),
    Mutation(
        "the same views in each epoch",
        LOADER,
        "            return epoch\n        return PLAIN + epoch",
        "            return 0\n        return PLAIN + epoch",
        "trainer/images/test_sampler.py -k views",
    ),
    Mutation(
        "two processes share one shard",
        "trainer/images/sampler.py",
        "        first = self.rank * each + min(self.rank, rest)\n",
        "        first = self.rank * each\n",
        "trainer/distributed/test_distributed.py -k shares_of_all",
    ),
    Mutation(
        "each process evaluates all pictures",
        "trainer/images/sampler.py",
        "batches[self.rank :: self.size]",
        "batches[::1]",
        "trainer/distributed/test_distributed.py -k shares_of_all",
    ),
    # --- what is resumed ---
    *(
        Mutation(
            f"{what} not resumed",
            TRAINING,
            old,
            new,
            f"trainer/training/test_loop.py -k {test}",
        )
        for what, old, new, test in (
            (
                "the optimizer's state",
                '        _restore_optimizer(self.optimizer, state["optimizer"])\n',
                "",
                "stop_at_any_batch",
            ),
            (
                "float16's scale",
                '        self.scaler.load_state_dict(state["scaler"])\n',
                "",
                "float16",
            ),
            (
                "the moving average",
                'self.ema.network.load_state_dict(state["average"])',
                'self.ema.network.load_state_dict(state["network"])',
                "stop_at_any_batch",
            ),
            (
                "the schedule's position",
                '        self.progress = Progress(**state["progress"])\n',
                '        self.progress = Progress(**state["progress"] | {"step": 0})\n',
                "stop_at_any_batch",
            ),
        )
    ),
    Mutation(
        "a resumed epoch begins at its first picture",
        LOADER,
        "self.share.of_training(self.epoch(epoch)[first:])",
        "self.share.of_training(self.epoch(epoch))",
        "trainer/training/test_loop.py -k stop_at_any_batch",
    ),
    Mutation(
        "a resumed epoch begins at its first feature",
        "trainer/network/features.py",
        "self.share.of_training(batches[first:])",
        "self.share.of_training(batches)",
        "trainer/network/test_features.py -k from_any_batch",
    ),
    Mutation(
        "the best weights are lost at a resume",
        "trainer/training/checkpoints.py",
        'self._best = self._copy(state["best"], None)',
        "pass",
        "trainer/training/test_damage.py -k killed_at_its_end",
    ),
    Mutation(
        "a step doesn't wait for the copy of what it changes",
        LOOP,
        "run.checkpoints.settle()",
        "pass",
        "trainer/training/test_loop.py -k of_its_moment",
    ),
    Mutation(
        "BatchNorm's statistics in a checkpoint are those of the next batch",
        TRAINING,
        "weights[name] = weights[name].clone()",
        "pass",
        "trainer/training/test_loop.py -k of_its_moment",
    ),
    # --- the average, metrics, the best ---
    Mutation(
        "the average is not evaluated",
        TRAINING,
        "return self.ema.network if self.ema else self.forward",
        "return self.forward",
        wiring("ema_decay"),
    ),
    Mutation(
        "the average moves by its decay",
        "trainer/network/ema.py",
        "lerp_(self._mine, self._its, 1 - decay)",
        "lerp_(self._mine, self._its, decay)",
        "trainer/training/test_loop.py -k weighted_sum",
    ),
    Mutation(
        "macro F1 is micro F1",
        "trainer/training/metrics.py",
        'multiclass_f1_score(first, labels, classes, average="macro")',
        'multiclass_f1_score(first, labels, classes, average="micro")',
        "trainer/training/test_classification.py",
    ),
    Mutation(
        "top-5 is top-1",
        "trainer/training/metrics.py",
        "logits.topk(min(5, classes)).indices",
        "logits.topk(1).indices",
        "trainer/training/test_classification.py",
    ),
    Mutation(
        "the highest loss is the best",
        "trainer/training/metrics.py",
        "        return metrics[monitor] < best[monitor]",
        "        return metrics[monitor] > best[monitor]",
        "trainer/training/test_classification.py -k better",
    ),
    Mutation(
        "the best weights not loaded before they are packaged",
        TRAINING,
        '        self.load_eval_weights(best["network"])\n',
        "",
        "trainer/training/test_damage.py -k best_weights_are_packaged",
    ),
    Mutation(
        "the weights and not their average kept as the best",
        TRAINING,
        "model = self.ema.network if self.ema else self.model\n        self.checkpoints",
        "model = self.model\n        self.checkpoints",
        "trainer/training/test_damage.py -k best_weights_are_packaged",
    ),
    # --- the package and what it says ---
    Mutation(
        "another resize in the package than in training",
        OUTCOME,
        "        preprocessing=pixels,\n        metrics",
        "        preprocessing=replace(pixels, resize=pixels.size),\n        metrics",
        wiring("resize"),
    ),
    Mutation(
        "a page: a stage within another is counted by itself",
        "trainer/common/stages.py",
        "if self._state[1] != START:",
        "if self._state[1] == name:",
        "trainer/common/test_console.py",
    ),
    Mutation(
        "a page: the classes in the order of their names",
        "trainer/results/confusion.py",
        'return np.argsort(fiedler, kind="stable")',
        "return np.arange(size)",
        "trainer/results/test_advice.py",
    ),
    Mutation(
        "a page: light where the network did not look",
        "trainer/network/saliency.py",
        "return _share((slopes * places).sum(-1))",
        "return _share((slopes * places).sum(-1).flip(0))",
        "trainer/network/test_saliency.py",
    ),
    Mutation(
        "a page: the run before is another data set's",
        "trainer/results/predecessor.py",
        "if summary is None or summary.test is None or summary.data != data:",
        "if summary is None or summary.test is None:",
        "trainer/results/test_runs.py",
    ),
    Mutation(
        "a page: a run that another one beats is called unbeaten",
        "trainer/results/index.py",
        "dots.append(Dot(run, x(spent), 1 - y(right), not beaten))",
        "dots.append(Dot(run, x(spent), 1 - y(right), True))",
        "trainer/results/test_runs.py",
    ),
    Mutation(
        "a page: ties of a sweep are not said",
        "trainer/sweep/page.py",
        "ties=_ties(page),",
        "ties=[],",
        "trainer/sweep/test_page.py",
    ),
    Mutation(
        "a terminal is shown the metric line",
        "trainer/common/console.py",
        "if told is not None and self.level == USUAL and sys.stdout.isatty():",
        "if told is not None and self.level == VERBOSE and sys.stdout.isatty():",
        "trainer/common/test_console.py",
    ),
    Mutation(
        "a typing error leaves a directory of a run",
        "trainer/training/run.py",
        "        if is_new:\n            _discard_untrained(run)",
        "        if not is_new:\n            _discard_untrained(run)",
        "trainer/results/test_early.py",
    ),
    Mutation(
        "the package without its calibration",
        OUTCOME,
        "calibration=tested.quality.calibration,",
        "calibration=calibrate.Calibration(),",
        "trainer/results/test_outcome.py",
    ),
    Mutation(
        "the calibration fitted to test",
        OUTCOME,
        '    if split != "valid":\n        valid = _unseen',
        '    if split == "":\n        valid = _unseen',
        "trainer/results/test_outcome.py",
    ),
    Mutation(
        "logits multiplied by the temperature",
        CALIBRATE,
        "logits.astype(np.float64) / self.temperature",
        "logits.astype(np.float64) * self.temperature",
        "trainer/results/test_calibrate.py",
    ),
    Mutation(
        "sets without the correction for few pictures",
        CALIBRATE,
        "return -(-(count + 1) * percent // 100)",
        "return -(-count * percent // 100)",
        "trainer/results/test_calibrate.py -k sets",
    ),
    Mutation(
        "sets by the wrong end of the probabilities",
        CALIBRATE,
        "np.sort(right)[len(labels) - rank]",
        "np.sort(right)[rank - 1]",
        "trainer/results/test_calibrate.py -k sets",
    ),
    Mutation(
        "statistics that are to be kept move",
        TRAINING,
        'network.keeps_norm_stats = model.norm_stats == "keep"',
        "network.keeps_norm_stats = False",
        wiring("norm_stats"),
    ),
)


def mutated(mutation: Mutation, root: Path) -> str | None:
    """Put the fault into a copy of the code; return what is wrong with the mutation itself."""
    text = (PROJECT / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        return f"{mutation.file} holds its text {text.count(mutation.old)} times"
    _replace(root / mutation.file, text.replace(mutation.old, mutation.new))
    return None


def mended(mutation: Mutation, root: Path) -> None:
    """Put the code back as it is."""
    _replace(root / mutation.file, (PROJECT / mutation.file).read_text())


def _replace(path: Path, text: str) -> None:
    path.write_text(text)
    # What Python has compiled it to counts as new for as long as a second.
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def passes(test: str, root: Path) -> tuple[bool | None, str]:
    """Return whether a test passes in a copy of the code, None where there is none; its last line.

    The exit codes are pytest's.
    """
    path, *chosen = test.split(" ")
    words = ["-q", "-x", "-p", "no:cacheprovider", f"tests/{path}", *chosen]
    with tempfile.TemporaryFile("w+") as output:
        process = FORKS.Process(target=_pytest, args=(words, root, output.fileno()))
        process.start()
        process.join()
        output.seek(0)
        lines = output.read().strip().splitlines()
    code = process.exitcode
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    said = [*failed, *lines[-1:], ""][0]
    if code not in (0, 1):
        return None, said
    return code == 0, said


def _pytest(words: Sequence[str], root: Path, output: int) -> None:
    """Be the process that `python -m pytest WORDS` in `root` would be, in a fork of this one."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    # Nothing of this copy of the code: what is imported is the other one.
    own = [name for name in sys.modules if name.split(".")[0] in ("tests", "trainer")]
    for name in own:
        del sys.modules[name]
    sys.path[:0] = [str(root)]
    multiprocessing.set_start_method(None, force=True)
    code = pytest.main(list(words))
    sys.stdout.flush()
    os._exit(code)


def copy_of_the_code(root: Path) -> None:
    """Make the folder `root`, and copy the code into it."""
    root.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "node_modules")
    for name in COPIED:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, root / name, ignore=ignored)
        else:
            shutil.copy(PROJECT / name, root / name)


def verdicts(chosen: Sequence[Mutation]) -> Iterator[tuple[Mutation, str | None, str]]:
    """Yield each mutation with what is wrong (None: it was noticed), and what pytest said."""
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="packhorse-mutations-") as scratch:
        root = Path(scratch) / "code"
        copy_of_the_code(root)
        for mutation in chosen:
            wrong, said = mutated(mutation, root), ""
            if wrong is None:
                passed, said = passes(mutation.test, root)
                if passed:
                    wrong = "survived"
                if passed is None:
                    wrong = "its test did not run"
                mended(mutation, root)
            yield mutation, wrong, said


def main() -> int:
    """Try the mutations whose fault holds the words given; return 1 where one was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="")
    word = parser.parse_args().word
    chosen = [each for each in MUTATIONS if word in each.fault]
    unnoticed = 0
    for mutation, wrong, said in verdicts(chosen):
        verdict = "noticed"
        if wrong:
            verdict = f"NOT NOTICED: {wrong}"
            unnoticed += 1
        print(f"{verdict}: {mutation.fault} ({mutation.file})\n  by {said}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} mutations were noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
