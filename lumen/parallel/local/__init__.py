"""Ranks that train apart, and are joined by an outer optimizer every few steps."""
