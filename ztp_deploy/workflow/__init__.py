"""What commands do, step by step, from what was asked of them to evidence."""
