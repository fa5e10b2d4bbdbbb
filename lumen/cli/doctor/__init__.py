"""`lumen doctor`: check the software, devices and processes of this machine."""
