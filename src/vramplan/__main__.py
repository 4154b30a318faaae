"""`python -m vramplan` is the `vramplan` command."""

from vramplan.planner.cli import main

if __name__ == "__main__":
    main()
