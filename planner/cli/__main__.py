"""`python -m planner.cli`: the command, where no script of that name is installed."""

from planner.cli.main import main

main()
