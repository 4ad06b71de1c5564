"""Emoji in seven drawing styles as image-caption shards; see README.md beside this file."""
