"""`ztp tune`: the plan that changes a model's predictions least within a budget, found without labels."""
