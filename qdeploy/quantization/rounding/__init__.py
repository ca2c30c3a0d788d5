"""Choose the integers of every layer: in one pass, layer by layer, or from moments."""
