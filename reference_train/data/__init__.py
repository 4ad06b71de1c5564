"""Emoji, icons and photographs, and a reader of their tar files."""
