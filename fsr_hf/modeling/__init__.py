"""Models: the method, its fit into `generate()`, and one class per family."""
