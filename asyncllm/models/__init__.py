"""Model families, as plain modules, and the registry that finds them."""
