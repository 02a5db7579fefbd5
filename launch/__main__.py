"""`python -m launch`: the commands of launch/cli.py."""

from launch.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
