"""Layers that backbones and heads share, and how they are computed."""
