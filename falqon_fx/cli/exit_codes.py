"""What the program's exit codes mean."""

DONE = 0
FAILED = 1  # a `FalqonError`: the model or the options can't be used as asked
USAGE = 2  # a wrong command line; typer's own number
FOUND = 3  # `explain --check` found rejected or no sites, or `repro` a difference
