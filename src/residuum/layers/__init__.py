"""Layers: blocks that share their weights, learn together, or are limited in what they do."""
