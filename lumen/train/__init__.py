"""The Runner and its settings: when to stop, when to validate, what to save and what to show."""
