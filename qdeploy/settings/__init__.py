"""What a person writes down in TOML: cards, recipes, policies, devices, methods, sanitizers."""
