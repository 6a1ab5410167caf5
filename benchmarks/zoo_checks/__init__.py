"""How the zoo judges a capture: equality with the eager model, balance, peers, processes and tables."""
