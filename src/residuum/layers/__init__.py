"""Layers: blocks that are steps of an equation or run backwards, share weights, learn together, or are limited."""
