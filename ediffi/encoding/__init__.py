"""Frozen encoders and what is kept of their output."""
