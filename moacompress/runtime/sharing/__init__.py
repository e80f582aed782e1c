"""Layers that share attention: what they take from their anchors, and the projections that they do without."""
