"""Backends: implementations of the grouped matrix product of the experts. They hold no weights."""
