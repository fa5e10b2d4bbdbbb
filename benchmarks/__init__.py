"""The benchmarks, one suite: `make bench`, or `python -m benchmarks --help`."""
