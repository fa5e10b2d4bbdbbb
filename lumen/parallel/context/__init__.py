"""Context parallelism: the sequences of a batch sharded over processes."""
