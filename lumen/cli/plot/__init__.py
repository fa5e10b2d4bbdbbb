"""`lumen plot`: plot the curves of runs on the terminal or in a file."""
