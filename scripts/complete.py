"""Measure a trained run: `python scripts/complete.py run=outputs/NAME`. `--help` explains every setting."""

from biglearn_vae import commands

if __name__ == "__main__":
    commands.main(commands.complete, config_name="complete")
