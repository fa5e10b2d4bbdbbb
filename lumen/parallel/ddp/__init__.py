"""Data parallelism: whole params on each process, gradients reduced over all of them."""
