"""What can only be tested and timed on a GPU, in one command."""
