.DEFAULT_GOAL := help
.PHONY: help setup train doctor care serve rehearse plan deploy test long check soak soak-serving faults mutations coverage bench bench-compare docs ends vulnerabilities lock matrix release site transcripts pages hosts doors signatures trackers engines clean
SHELL := /bin/bash
BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## /  make \1\t/' | expand -t 18

setup: $(addprefix .venv/,$(or $(EXTRA),train))  ## add extras of pyproject.toml to .venv: EXTRA=sweep, or EXTRA="timm audit"

train: .venv/train  ## set up once, then train: on the pictures that ship, or as ARGS="data=folder data.root=DIR" says; GPUS=4 for several
	$(BIN)/python $(if $(GPUS),-m trainer.distributed.torchrun --standalone --nproc_per_node=$(GPUS)) -m trainer $(ARGS)

doctor: .venv/train  ## what this machine can do with a run of ARGS, how long it takes, what would make it faster
	$(BIN)/python -m trainer.doctor $(ARGS)

care: .venv/train  ## look for duplicates, leaks and doubtful labels in a folder of pictures, without training (ARGS="DIR")
	$(BIN)/python -m trainer.care $(ARGS)

serve: .venv/train  ## answer on HTTP with the newest run's model, and a page to try it (ARGS="runs/NAME/model.tar.gz")
	$(BIN)/python -m serving serve $(ARGS)

rehearse: .venv/rehearse  ## run a SageMaker job on this machine: TARGET=sagemaker|sagemaker_multi|tuner ARGS="train.epochs=1"
	$(BIN)/python -m launch rehearse target=$(or $(TARGET),sagemaker) $(ARGS)

plan: .venv/train  ## what a run on AWS would do, cost and touch; sends nothing: TARGET=ec2|sagemaker|tuner ARGS="data.root=DIR"
	$(BIN)/python -m launch plan target=$(or $(TARGET),ec2) $(ARGS)

deploy: .venv/train  ## endpoint, autoscaling and Lambda function on AWS (ARGS="MODEL"); asks before it changes anything
	$(BIN)/python -m serving deploy $(ARGS)

# What is compiled is kept: two workers and hundreds of processes import the same modules.
test: .venv/dev  ## set up once, then run the tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

long: .venv/dev  ## the tests that take minutes: rehearsals, the EC2 script, kills at every AWS call, lost processes, every training command of the docs, a wheel
	$(BIN)/python -m pytest -m long $(ARGS)

check: .venv/dev  ## lint, format, types and spelling
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/codespell

coverage: .venv/dev  ## the tests, with the share of the lines that they run, and which they don't (ARGS="tests/trainer")
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal $(ARGS)
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report

soak: .venv/dev  ## end real runs 200 times at every stage, damage files in between, and compare each with an undisturbed one (KILLS=n SEED=n)
	$(BIN)/python -m tests.soak --kills $(or $(KILLS),200) --seed $(or $(SEED),0)

mutations: .venv/dev  ## put faults into copies of the code, and see a test of `make test` notice each (ARGS="WORD": of the faults)
	$(BIN)/python -m tests.mutations $(ARGS)

soak-serving: .venv/dev  ## nine attacks on a server at once while good pictures are asked about: latency, memory, /ping (ATTACKED=seconds)
	$(BIN)/python -m tests.serving.soak --seconds $(or $(ATTACKED),300)

faults: .venv/dev  ## let one call to the system fail in each of 200 real runs, and compare each with an undisturbed one (COUNT=n SEED=n); needs a C compiler
	$(BIN)/python -m tests.faults --count $(or $(COUNT),200) --seed $(or $(SEED),0)

bench: .venv/bench  ## measure against peers in one run, and write docs/benchmarks.md (ARGS="input loop start stall"; ARGS=--quick)
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-compare: .venv/bench  ## measure another revision and this one in turns (REV=v0.1.0 ARGS="input loop")
	$(BIN)/python -m tests.benchmarks.compare $(or $(REV),$(error give REV=REVISION)) $(ARGS)

docs: .venv/dev  ## write what docs/ takes from the code: every setting, what AWS refuses
	$(BIN)/python -m tests.reference

ends: .venv/dev  ## until when AWS supports what is used here; fails 60 days before the first end, and where botocore knows something newer
	$(BIN)/python -m tests.ends $(ARGS)

vulnerabilities: .venv-tools/made  ## ask PyPI whether a version that is installed has a known vulnerability (pip-audit)
	.venv-tools/bin/pip-audit --strict --requirement requirements.lock --no-deps --disable-pip

lock: .venv-tools/made  ## write requirements.lock, with hashes, from constraints.txt
	.venv-tools/bin/python -m tests.lock

matrix: .venv/train  ## the wheel with the oldest and the newest PyTorch and Python, in environments of their own: 6 GB each (ARGS=oldest)
	$(BIN)/python -m tests.matrix $(ARGS)

release: .venv-tools/made  ## wheel and source archive, twice to the same bytes, and their bill of materials, in dist/ (ARGS=--tag)
	.venv-tools/bin/python -m tests.release $(ARGS)

site: .venv-tools/made  ## the documents as a site, in build/site, without a warning and without a network
	NO_MKDOCS_2_WARNING=1 .venv-tools/bin/python -m mkdocs build --strict --quiet --clean

transcripts: .venv/dev  ## write what the commands of the AWS pages say, by a stand-in for AWS, into docs/
	WRITE_TRANSCRIPTS=1 $(BIN)/python -m pytest -q tests/test_docs.py -k "test_the_launch_commands or test_the_serving_commands"

pages: .venv/dev  ## install Chromium (apt-get) and open the pages in it
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	$(BIN)/python -m pytest -m chromium

hosts: .venv/dev  ## install iproute2 (apt-get) and train on two hosts, as network namespaces; needs root
	command -v ip >/dev/null || { apt-get update -qq && apt-get install -y -qq iproute2; }
	$(BIN)/python -m pytest -m long tests/trainer/distributed/test_two_hosts.py

doors: .venv/dev  ## install TorchServe, AWS's toolkit, Ray Serve and Java (apt-get), and ask the same model through each; in .venv-doors
	command -v java >/dev/null || { apt-get update -qq && apt-get install -y -qq default-jre-headless; }
	test -x .venv-doors/bin/ray || { $(BIN)/python -m venv .venv-doors && .venv-doors/bin/pip install -q -c .venv/constraints.txt -e '.[doors]'; }
	$(BIN)/python -m pytest -m '' tests/serving/test_adapters.py

signatures: .venv/dev  ## install OpenSSF's model-signing, and let it and us verify each other's signatures; in .venv-sign
	test -x .venv-sign/bin/model_signing || { $(BIN)/python -m venv .venv-sign && .venv-sign/bin/pip install -q 'model-signing>=1.1' pyopenssl; }
	$(BIN)/python -m pytest -m '' tests/serving/test_signature.py

# On top of .venv, so that PyTorch is not installed twice.
trackers: .venv/dev  ## install MLflow and W&B, and look at a killed run in them; in .venv-trackers
	test -x .venv-trackers/bin/wandb || { $(BIN)/python -m venv .venv-trackers \
	  && $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo .venv-trackers/lib/python3.*/site-packages)/below.pth \
	  && .venv-trackers/bin/python -m pip install -q -c .venv/constraints.txt -e '.[mlflow,wandb]'; }
	nice -n 15 .venv-trackers/bin/python -m pytest -m '' tests/trainer/training/test_tracking.py

engines: .venv/dev  ## install SkyPilot and dstack, and let them read what launch export writes; in .venv-engines
	for engine in skypilot dstack; do \
	  test -x .venv-engines/$$engine/bin/python || $(BIN)/python -m venv .venv-engines/$$engine; \
	done
	.venv-engines/skypilot/bin/pip install -q 'skypilot[aws]' && .venv-engines/dstack/bin/pip install -q dstack
	$(BIN)/python -m pytest tests/launch/test_exports.py

clean:  ## remove the virtual environment and caches; runs and data stay
	rm -rf .venv .venv-doors .venv-sign .venv-trackers .venv-engines .venv-tools build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# What builds the site and a release has an environment of its own: its versions are not the trainer's.
.venv-tools/made: requirements-tools.txt
	python3 -m venv .venv-tools && .venv-tools/bin/pip install --quiet --disable-pip-version-check -r $< && touch $@

# What is installed depends on these files alone, so a second make sets nothing up.
.venv/%: pyproject.toml constraints.txt .ci/setup
	.ci/setup $*

.venv/dev: tests/launch/npm/package-lock.json
