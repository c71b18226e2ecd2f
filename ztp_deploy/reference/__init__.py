"""The reference classifier: a small ViT, trained here, that has to find a digit in clutter before it can read it."""
