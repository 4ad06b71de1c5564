"""Everything that needs a GPU to be known, in one command."""
