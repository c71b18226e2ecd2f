"""`ztp show`: which patches each stage dropped and why, as pictures and as numbers."""
