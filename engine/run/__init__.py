"""A request through all networks, within a budget."""
