"""Tensor parallelism: single matrices sharded over processes."""
