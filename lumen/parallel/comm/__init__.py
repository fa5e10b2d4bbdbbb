"""Communication between processes: meshes and process groups, collectives, buckets, consistency checks."""
