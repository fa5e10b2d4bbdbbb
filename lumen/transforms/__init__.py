"""Step transforms, one file each."""
