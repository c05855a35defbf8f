"""`python -m moa_lab` is the `moa-lab` command."""

from moa_lab.commands.app import main

if __name__ == "__main__":
    main()
