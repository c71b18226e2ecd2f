"""Evidence: images, parity, latency, and the report that shows them."""
