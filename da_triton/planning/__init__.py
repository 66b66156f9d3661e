"""Cost of a block in each association order and route, and the choice between them."""
