"""ONNX Runtime: the back end (`backend`), and what is done to a graph for it."""
