"""Placement of the model's weights: one rank, FSDP2 (native), and other engines."""
