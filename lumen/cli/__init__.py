"""The command line: `lumen demo`, `doctor`, `plan`, `inspect`, `export` and `replay`."""
