"""Emoji and icons, and a reader of their tar files."""
