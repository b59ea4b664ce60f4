"""Public models that a plan knows by name, each a record of its configuration's numbers with their source."""
