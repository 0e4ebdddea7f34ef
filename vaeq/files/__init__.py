"""Files, read within bounds and verified: none is believed for what it says of itself."""
