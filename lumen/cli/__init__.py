"""The command line: `lumen inspect`, `lumen export` and `lumen replay`."""
