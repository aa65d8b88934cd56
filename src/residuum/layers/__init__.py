"""Layers: blocks that share, couple or limit what they do."""
