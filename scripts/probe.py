"""Linear probing of a trained run: `python scripts/probe.py run=outputs/NAME`. `--help` explains every setting."""

from biglearn_vae import commands

if __name__ == "__main__":
    commands.main(commands.probe, config_name="probe")
