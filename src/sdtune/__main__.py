"""``python -m sdtune``."""

from sdtune.cli.app import main

if __name__ == "__main__":
    main()
