"""`python worker.py`: a worker process. The same as `laneway worker`, with the same options."""

import sys

from laneway.cli import main

if __name__ == "__main__":
    main(["worker", *sys.argv[1:]])
