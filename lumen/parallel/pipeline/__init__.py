"""Pipeline parallelism: a model split into stages, each of which lives on one process."""
