"""The command where it is not installed but shipped, as in a Ray job: `python -m cluster`."""

from cluster.cli import main

if __name__ == "__main__":
    main()
