"""Commands for everything besides completing, scoring and training: `python -m tools.NAME --help`."""
