"""The paper's experiments: `python scripts/reproduce.py preset=smoke`. `--help` explains every setting."""

from biglearn_vae import commands

if __name__ == "__main__":
    commands.main(commands.reproduce, config_name="reproduce")
