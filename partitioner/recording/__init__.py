"""Recording: run a model's own forward on stand-ins for tensors and write down every torch call that it makes."""
