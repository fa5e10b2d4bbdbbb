"""`lumen doctor`: whether this machine has all that Lumen needs."""
