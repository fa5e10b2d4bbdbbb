"""What only a GPU can show, checked in one run of a few minutes: `python -m benchmarks.gpu`."""
