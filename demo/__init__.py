"""The page in the browser: `python -m demo`."""
