"""Measure a trained run: `python scripts/evaluate.py run=outputs/NAME`. `--help` explains every setting."""

from biglearn_vae import commands

if __name__ == "__main__":
    commands.main(commands.evaluate, config_name="evaluate")
