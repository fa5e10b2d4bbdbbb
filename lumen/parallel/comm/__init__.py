"""Communication between ranks: meshes and process groups, collectives, buckets, consistency checks."""
