"""Fully sharded data parallelism: params, gradients and optimizer state sharded over ranks."""
