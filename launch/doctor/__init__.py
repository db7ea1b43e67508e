"""Looks at a machine, or all ranks of a run together, before a run starts: all that is wrong, at once."""
