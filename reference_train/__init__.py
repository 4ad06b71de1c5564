"""Commands that train and evaluate CLIP and CyCLIP. README.md beside this file lists them."""
