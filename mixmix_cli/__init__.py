"""The face: parse what a person types, make one call into the craft, print the result."""

__version__ = "0.1.0"
