"""`python -m biglearn_vae train ...`: the scripts, wherever the package is installed."""

import sys

from biglearn_vae import commands

if __name__ == "__main__":
    names = ", ".join(commands.SCRIPTS)
    usage = f"python -m biglearn_vae SCRIPT ..., SCRIPT being one of {names}; SCRIPT --help explains it"
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(usage)
        sys.exit()
    if len(sys.argv) < 2 or sys.argv[1] not in commands.SCRIPTS:
        sys.exit(f"error: {usage}")
    commands.call(sys.argv[1], sys.argv[2:])
