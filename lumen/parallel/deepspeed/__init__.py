"""A step under a DeepSpeed engine."""
