"""The Runner, and what it is told: when to stop, when to validate, what to show."""
