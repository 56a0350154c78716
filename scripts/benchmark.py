"""Measure the training step: `python scripts/benchmark.py case=case1 data=mnist`. `--help` explains every setting."""

from biglearn_vae import commands

if __name__ == "__main__":
    commands.main(commands.benchmark, config_name="benchmark")
