"""`python -m chainrule`, the command line: for launchers that take a module."""

from chainrule.cli import main

if __name__ == "__main__":
    main()
