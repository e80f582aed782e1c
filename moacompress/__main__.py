"""`python -m moacompress` is the `moacompress` command."""

from moacompress.cli import main

if __name__ == "__main__":
    main()
