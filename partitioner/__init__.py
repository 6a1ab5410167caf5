"""From a model to a plan: capture, op graph, costs, cut, schedule choice, split."""
