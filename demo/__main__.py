"""The demo page: `python -m demo`."""

from demo.page import main
from utils import run_cli

if __name__ == "__main__":
    run_cli(main)
