"""`python scheduler.py`: a scheduler process. The same as `laneway scheduler`, with the same options."""

import sys

from laneway.cli import main

if __name__ == "__main__":
    main(["scheduler", *sys.argv[1:]])
