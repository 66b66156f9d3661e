"""What a block costs in each association order and route, and which one runs."""
