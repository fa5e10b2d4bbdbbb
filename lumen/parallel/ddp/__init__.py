"""Data parallelism: full params on each rank, gradients reduced over all ranks."""
