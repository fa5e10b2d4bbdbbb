"""How time and memory grow with params, leaves, microbatches, lanes, ranks, rows, metrics and steps."""
