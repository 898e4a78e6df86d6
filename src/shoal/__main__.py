"""`python -m shoal`, for where the `shoal` command is not on the path."""

from shoal.cli.main import main

main()
