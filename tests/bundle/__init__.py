"""Proof of a bundle: `make test-bundle` packs one and runs it where there is nothing else."""
