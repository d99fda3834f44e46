"""`python -m formary`: the same as the `formary` command."""

from formary.cli.main import main

if __name__ == "__main__":
    main()
