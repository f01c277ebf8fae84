# Every target is one line; what it does is in the file that it calls.
.PHONY: help setup check test unit sim calls bench demo demo-down images cluster cluster-down crds client requirements newest-pipecat

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## make the virtual environment

.venv/ready: tests/requirements.txt pyproject.toml tests/setup
	@tests/setup

check: .venv/ready ## format, lint, types, layers: what a commit must pass
	@tests/check

unit: .venv/ready ## the tests that need no cluster
	@tests/run unit

sim: .venv/ready ## play SEEDS simulated stories (200 unless told)
	@.venv/bin/python -m tests.sim --seeds $(or $(SEEDS),200)

calls: .venv/ready ## make CALLS calls on a cluster (100 unless told) one after the other, then as many ten at a time, and look at what is left of them
	@VOICEPOOL_LEAK_CALLS=$(or $(CALLS),100) .venv/bin/python -m pytest tests/e2e/test_leaks.py

bench: .venv/ready ## measure; NAMES are of agent bind replace fill operator-size (all unless told)
	@.venv/bin/python -m tests.bench $(NAMES)

test: .venv/ready ## everything that CI runs
	@tests/run all

demo: .venv/ready ## from a fresh clone to a conversation
	@.venv/bin/python -m tests.e2e.demo up

demo-down: .venv/ready ## remove everything that the demo made
	@.venv/bin/python -m tests.e2e.demo down

images: .venv/ready ## build the container images
	@.venv/bin/python -m tests.cluster.images build

cluster: .venv/ready ## a Kubernetes on this machine
	@.venv/bin/python -m tests.cluster up

cluster-down: .venv/ready ## and away with it
	@.venv/bin/python -m tests.cluster down

crds: .venv/ready ## write crds/ anew from the models
	@.venv/bin/python -m voicepool.main crd --write crds helm/voicepool/files

client: .venv/ready ## write the client without async anew from the one with it
	@.venv/bin/python -m tests.without_async

requirements: .venv/ready ## pin all dependencies anew
	@tests/lock

newest-pipecat: .venv/ready ## try Pipecat's newest release on what the agent takes for granted; for a weekly job
	@tests/newest-pipecat
