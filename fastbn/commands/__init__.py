"""The commands, one file for each: `add_to` declares its options, `run` does it and prints."""
