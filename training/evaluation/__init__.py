"""Decoding of trained models, their scores, attention maps and the report of a run."""
