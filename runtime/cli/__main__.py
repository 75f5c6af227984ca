"""`python -m runtime.cli`: the command, where no script of that name is installed."""

from runtime.cli.main import main

main()
