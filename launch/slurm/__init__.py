"""Runs under SLURM."""
