"""Tokens to text and back, off the event loop."""
