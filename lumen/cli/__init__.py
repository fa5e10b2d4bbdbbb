"""The command line: `lumen demo`, `doctor`, `plan`, `plot`, `inspect`, `export` and `replay`."""
