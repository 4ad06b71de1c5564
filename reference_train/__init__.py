"""CLIP and CyCLIP trained and evaluated by one command each; see README.md beside this file."""
