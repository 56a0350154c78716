"""Draw a trained run: `python scripts/figures.py run=outputs/NAME`. `--help` explains every setting."""

from biglearn_vae import commands

if __name__ == "__main__":
    commands.main(commands.figures, config_name="figures")
