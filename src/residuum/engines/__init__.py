"""Engines: where the runs of a sweep are carried out. Each carries paths of folders, and nothing else."""
