"""Measurements behind the figures of the documentation; README.md lists them."""
