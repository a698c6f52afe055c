"""``python -m kfac_cli``: the command, where the script is not on the path."""

from kfac_cli.main import main

if __name__ == "__main__":
    main()
