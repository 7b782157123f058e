"""Speed next to the runtimes that people use: `python -m tools.bench --help`."""
