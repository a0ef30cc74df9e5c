"""What `screenshots.py` is made of."""
