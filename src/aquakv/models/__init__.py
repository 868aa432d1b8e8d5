"""What aquakv needs to know of models: where their layers are, how they rotate keys, how to load them."""
