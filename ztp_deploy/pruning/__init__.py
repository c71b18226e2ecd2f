"""Selecting tokens inside a model: tensor helpers, the pruned module, the trace of what was kept."""
