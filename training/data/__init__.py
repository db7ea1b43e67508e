"""Prepared data as it lies on the disk, and how it is read."""
