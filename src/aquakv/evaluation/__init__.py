"""Measuring what compression costs."""
