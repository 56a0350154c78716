"""Train a BigLearn-VAE: `python scripts/train.py case=case1 data=mnist`. `--help` explains every setting."""

from biglearn_vae import commands

if __name__ == "__main__":
    commands.main(commands.train, config_name="train")
